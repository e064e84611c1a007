// unmask::select_set: from tensors to SelectSetParams.
#include "ops/select_set.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "checks.h"

namespace unmask {
namespace {

template <bool kCuda>
std::tuple<Tensor, Tensor> select_set(const Tensor& packed, int64_t hidden, int64_t heads, int64_t ffn, int64_t layers,
                                      const Tensor& x, const Tensor& prior, const Tensor& allowed, const Tensor& risk,
                                      double sure, int64_t runs) {
  [[maybe_unused]] const auto scope = device_scope<kCuda>(x);
  check_network(hidden, heads, ffn);
  check_value(layers >= 1 && layers <= kMaxSetLayers, "layers", layers, "1 to 8");
  check_value(sure > 0.0 && sure < 1.0, "sure", sure, "a number between 0 and 1");
  check_value(runs >= 1, "runs", runs, "at least 1");
  check_value(allowed.dim() == 2, "allowed", allowed.sizes(), "shape (B, L)");
  const int64_t batch = allowed.size(0), length = allowed.size(1);
  Arguments in(x);
  SelectSetParams params{};
  params.sizes = PolicySizes{hidden, heads, ffn, 0};
  params.layers = layers;
  params.batch = batch;
  params.length = length;
  params.allowed = in.read<uint8_t>(allowed, "allowed", {batch, length});
  params.x = in.read<float>(x, "x", {batch, length, hidden});
  params.prior = in.read<float>(prior, "prior", {batch, length});
  params.risk = in.read<float>(risk, "risk", {batch});
  params.weights = in.read<float>(packed, "packed", {set_weight_count(params.sizes, layers)});
  params.sure = static_cast<float>(sure);
  params.runs = runs;
  const Tensor select = allocate({batch, length}, ScalarType::Bool, x);
  const Tensor score = allocate({batch, length}, ScalarType::Float, x);
  params.select = write<uint8_t>(select);
  params.score = write<float>(score);
  if (batch == 0 || length == 0) return {select, score};

  if constexpr (kCuda) {
    const Tensor scratch = workspace(cuda::select_set_workspace(params), x);
    check_cuda(cuda::select_set(params, scratch.mutable_data_ptr(), current_stream(x)), "select_set");
  } else {
    // A row with a choice is always enough work for a thread of its own.
    torch::stable::parallel_for(0, batch, 1,
                                [&params](int64_t begin, int64_t end) { cpu::select_set(params, begin, end); });
  }
  return {select, score};
}

}  // namespace
}  // namespace unmask

STABLE_TORCH_LIBRARY_IMPL(unmask, CPU, m) { m.impl("select_set", TORCH_BOX(&unmask::select_set<false>)); }

#ifdef UNMASK_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(unmask, CUDA, m) { m.impl("select_set", TORCH_BOX(&unmask::select_set<true>)); }
#endif
