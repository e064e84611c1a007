// The module unmask._C: schemas of the ops, and what this build consists of.
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/version.h>

#include <string>

#include "cpu/isa.h"

#ifndef UNMASK_CUDA_ARCHS
#define UNMASK_CUDA_ARCHS ""
#endif

STABLE_TORCH_LIBRARY(unmask, m) {
  // logsumexp and entropy are empty, shape (0,), unless asked for.
  m.def(
      "topk_confidence(Tensor logits, int k, Tensor? rows, Tensor? select, float temperature, Tensor? seed, "
      "Tensor? counter, int[] exclude, bool logsumexp, bool entropy) -> (Tensor confidence, Tensor token, "
      "Tensor sample, Tensor sample_confidence, Tensor logsumexp, Tensor entropy)");
  m.def(
      "policy_forward(Tensor packed, int hidden, int heads, int ffn, int confidences, Tensor mask, Tensor confidence, "
      "Tensor time, Tensor? rows, Tensor? cond) -> Tensor");
  // action is the number of an ActionMode (torch.compile cannot call an op that has an argument named mode); eos < 0
  // means none.
  m.def(
      "unmask_(Tensor(a!) tokens, Tensor token, Tensor score, Tensor(b!) mask, Tensor(c!) allowed, Tensor(d!) steps, "
      "Tensor(e!) remaining, Tensor(f!) block, Tensor(g!) done, Tensor(h!) status, int start, int block_length, "
      "int max_steps, int action, int eos, float temperature, float scale, float stop_logit, Tensor? seed, "
      "Tensor? sequence) -> Tensor");
}

namespace unmask {
void bind_graph_loop(pybind11::module_& module);  // csrc/torch/graph_loop.cpp
}

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
  module.doc() = "Kernels of unmask; importing this module registers torch.ops.unmask.*.";
  module.def("build_info", &build_info,
             "Dict: cuda (bool), cuda_archs, compiler, built_with_torch, cpu_isa (in use), cpu_isas (usable here).");
  unmask::bind_graph_loop(module);
}
