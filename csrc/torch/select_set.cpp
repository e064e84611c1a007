// unmask::select_set: from tensors to SelectSetParams.
#include "ops/select_set.h"

#include <tuple>

#include "torch/policy_sizes.h"

namespace unmask {
namespace {

template <bool kCuda>
std::tuple<Tensor, Tensor> select_set(const Tensor& packed, int64_t hidden, int64_t heads, int64_t ffn, int64_t layers,
                                      const Tensor& table, const Tensor& tokens, const Tensor& candidates,
                                      const Tensor& mask, const Tensor& region, const Tensor& confidence,
                                      const Tensor& probability, const OptionalTensor& bias, const Tensor& allowed,
                                      const Tensor& risk, double sure, int64_t runs) {
  [[maybe_unused]] const auto scope = device_scope<kCuda>(mask);
  check_value(mask.dim() == 2, "mask", mask.sizes(), "shape (B, L)");
  check_value(confidence.dim() == 3, "confidence", confidence.sizes(), "shape (B, L, K)");
  check_value(table.dim() == 2 && table.size(0) >= 1, "table", table.sizes(), "shape (N, D) with N >= 1");
  const int64_t batch = mask.size(0), length = mask.size(1);
  Arguments in(mask);
  SelectSetParams params{};
  params.sizes = PolicySizes{hidden, heads, ffn, confidence.size(2)};
  check_network(params.sizes);
  check_value(layers >= 1 && layers <= kMaxSetLayers, "layers", layers, "1 to 8");
  check_value(sure > 0.0 && sure < 1.0, "sure", sure, "a number between 0 and 1");
  check_value(runs >= 1, "runs", runs, "at least 1");
  params.layers = layers;
  params.batch = batch;
  params.length = length;
  params.mask = in.read<uint8_t>(mask, "mask", {batch, length});
  params.tokens = in.read<int64_t>(tokens, "tokens", {batch, length});
  params.candidates = in.read<int64_t>(candidates, "candidates", {batch, length});
  params.region = in.read<uint8_t>(region, "region", {batch, length});
  params.confidence = in.read<float>(confidence, "confidence", {batch, length, params.sizes.confidences});
  params.probability = in.read<float>(probability, "probability", {batch, length});
  params.bias = in.read<float>(bias, "bias", {batch, length});
  params.allowed = in.read<uint8_t>(allowed, "allowed", {batch, length});
  params.risk = in.read<float>(risk, "risk", {batch});
  params.table_rows = table.size(0);
  params.table = in.read<float>(table, "table", {params.table_rows, hidden});
  params.weights = in.read<float>(packed, "packed", {set_weight_count(params.sizes, layers)});
  params.sure = static_cast<float>(sure);
  params.runs = runs;
  const Tensor select = allocate({batch, length}, ScalarType::Bool, mask);
  const Tensor score = allocate({batch, length}, ScalarType::Float, mask);
  params.select = write<uint8_t>(select);
  params.score = write<float>(score);
  if (batch == 0 || length == 0) return {select, score};

  if constexpr (kCuda) {
    const Tensor scratch = workspace(cuda::select_set_workspace(params), mask);
    check_cuda(cuda::select_set(params, scratch.mutable_data_ptr(), current_stream(mask)), "select_set");
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
