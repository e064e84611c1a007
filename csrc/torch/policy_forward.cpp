// unmask::policy_forward: from tensors to PolicyForwardParams.
#include "ops/policy_forward.h"

#include "torch/policy_sizes.h"

namespace unmask {
namespace {

template <bool kCuda>
Tensor policy_forward(const Tensor& packed, int64_t hidden, int64_t heads, int64_t ffn, int64_t confidences,
                      const Tensor& mask, const Tensor& confidence, const Tensor& time, const OptionalTensor& rows,
                      const OptionalTensor& cond) {
  [[maybe_unused]] const auto scope = device_scope<kCuda>(mask);
  check_network(PolicySizes{hidden, heads, ffn, confidences});
  check_value(mask.dim() == 2, "mask", mask.sizes(), "shape (B, L)");
  const int64_t batch = mask.size(0), length = mask.size(1);
  Arguments in(mask);
  PolicyForwardParams params{};
  params.sizes = PolicySizes{hidden, heads, ffn, confidences};
  params.batch = batch;
  params.length = length;
  params.mask = in.read<uint8_t>(mask, "mask", {batch, length});
  params.confidence = in.read<float>(confidence, "confidence", {batch, length, confidences});
  params.time = in.read<float>(time, "time", {batch});
  params.select = in.read<uint8_t>(rows, "rows", {batch, length});
  params.cond = in.read<float>(cond, "cond", {batch, hidden});
  params.weights = in.read<float>(packed, "packed", {policy_weight_count(params.sizes)});
  const Tensor logits = allocate({batch, length}, ScalarType::Float, mask);
  params.logits = write<float>(logits);
  if (batch == 0 || length == 0) return logits;

  if constexpr (kCuda) {
    const Tensor scratch = workspace(cuda::policy_forward_workspace(params), mask);
    check_cuda(cuda::policy_forward(params, scratch.mutable_data_ptr(), current_stream(mask)), "policy_forward");
  } else {
    // A sequence is always enough work for a thread of its own.
    torch::stable::parallel_for(0, batch, 1,
                                [&params](int64_t begin, int64_t end) { cpu::policy_forward(params, begin, end); });
  }
  return logits;
}

}  // namespace
}  // namespace unmask

STABLE_TORCH_LIBRARY_IMPL(unmask, CPU, m) { m.impl("policy_forward", TORCH_BOX(&unmask::policy_forward<false>)); }

#ifdef UNMASK_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(unmask, CUDA, m) { m.impl("policy_forward", TORCH_BOX(&unmask::policy_forward<true>)); }
#endif
