// The module unmask._C: what this build consists of. The ops are registered by csrc/torch, their schemas by
// unmask/ops/library.py.
#include <pybind11/pybind11.h>
#include <torch/headeronly/version.h>

#include <string>

#include "cpu/isa.h"

namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#elif defined(__GNUC__)
constexpr const char* kCompiler = "gcc " __VERSION__;
#else
constexpr const char* kCompiler = "unknown";
#endif

#ifdef UNMASK_WITH_CUDA
constexpr bool kCuda = true;
#else
constexpr bool kCuda = false;
#define UNMASK_CUDA_ARCHS ""
#endif

pybind11::dict build_info() {
  pybind11::list isas;
  for (const unmask::cpu::Isa isa : unmask::cpu::kBestFirst) {
    if (unmask::cpu::isa_supported(isa)) isas.insert(0, unmask::cpu::isa_name(isa));
  }
  pybind11::dict info;
  info["cuda"] = kCuda;
  info["cuda_archs"] = pybind11::str(UNMASK_CUDA_ARCHS).attr("split")();
  info["compiler"] = kCompiler;
  info["built_with_torch"] = std::to_string(TORCH_VERSION_MAJOR) + "." + std::to_string(TORCH_VERSION_MINOR) + "." +
                             std::to_string(TORCH_VERSION_PATCH);
  info["cpu_isa"] = unmask::cpu::isa_name(unmask::cpu::active_isa());
  info["cpu_isas"] = isas;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  unmask::cpu::active_isa();  // a wrong UNMASK_CPU_ISA stops the import, with its message
  module.doc() = "Kernels of unmask; importing this module registers them for torch.ops.unmask.*.";
  module.def("build_info", &build_info,
             "Dict: cuda (bool), cuda_archs, compiler, built_with_torch, cpu_isa (in use), cpu_isas (usable here).");
}
