// The module unmask._C: what this build consists of. The ops are registered by csrc/torch, their schemas by
// unmask/ops/library.py.
#include <pybind11/pybind11.h>
#include <torch/headeronly/version.h>

#include <string>

#include "cpu/isa.h"

#ifndef UNMASK_CUDA_ARCHS
#define UNMASK_CUDA_ARCHS ""
#endif

namespace {

std::string compiler() {
#if defined(__clang__)
  return std::string("clang ") + __clang_version__;
#elif defined(__GNUC__)
  return std::string("gcc ") + __VERSION__;
#else
  return "unknown";
#endif
}

pybind11::dict build_info() {
  using unmask::cpu::Isa;
  pybind11::list archs, isas;
  std::string arch;
  for (char c : std::string(UNMASK_CUDA_ARCHS) + " ") {
    if (c != ' ') {
      arch += c;
    } else if (!arch.empty()) {
      archs.append(arch);
      arch.clear();
    }
  }
  for (Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512}) {
    if (unmask::cpu::isa_supported(isa)) isas.append(unmask::cpu::isa_name(isa));
  }
  pybind11::dict info;
#ifdef UNMASK_WITH_CUDA
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
  info["cuda_archs"] = archs;
  info["compiler"] = compiler();
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
