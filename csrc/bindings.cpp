// The module unmask._C: what this build consists of. The ops are registered by csrc/torch, their schemas by
// unmask/ops/library.py.
#include <pybind11/pybind11.h>
#include <torch/headeronly/version.h>

#include <string>

#include "cpu/isa.h"

namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#else
constexpr const char* kCompiler = "gcc " __VERSION__;
#endif

#ifndef UNMASK_CUDA_ARCHS
#define UNMASK_CUDA_ARCHS ""
#endif

pybind11::dict build_info() {
  using namespace unmask::cpu;
  pybind11::list isas;
  for (const Isa isa : kBestFirst) {
    if (isa_supported(isa)) isas.insert(0, isa_name(isa));
  }
  const pybind11::object archs = pybind11::str(UNMASK_CUDA_ARCHS).attr("split")();
  const auto number = [](int part) { return std::to_string(part); };
  const std::string torch =
      number(TORCH_VERSION_MAJOR) + "." + number(TORCH_VERSION_MINOR) + "." + number(TORCH_VERSION_PATCH);
  using namespace pybind11::literals;
  return pybind11::dict("cuda"_a = pybind11::len(archs) > 0, "cuda_archs"_a = archs, "compiler"_a = kCompiler,
                        "built_with_torch"_a = torch, "cpu_isa"_a = isa_name(active_isa()), "cpu_isas"_a = isas);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  unmask::cpu::active_isa();  // a wrong UNMASK_CPU_ISA stops the import, with its message
  module.doc() = "Kernels of unmask; importing this module registers them for torch.ops.unmask.*.";
  module.def("build_info", &build_info,
             "Dict: cuda (bool), cuda_archs, compiler, built_with_torch, cpu_isa (in use), cpu_isas (usable here).");
}
