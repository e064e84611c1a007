// unmask::policy_forward: from tensors to PolicyForwardParams.
#include "ops/policy_forward.h"

#include <torch/csrc/stable/library.h>

#include "checks.h"

namespace unmask {
namespace {

// Tensors that must outlive the launch, and what it returns.
struct Prepared {
  PolicyForwardParams params{};
  Tensor packed, mask, confidence, time, logits;
  OptionalTensor rows, cond;
};

Prepared prepare(const Tensor& packed, int64_t hidden, int64_t heads, int64_t ffn, int64_t confidences,
                 const Tensor& mask, const Tensor& confidence, const Tensor& time, const OptionalTensor& rows,
                 const OptionalTensor& cond) {
  Prepared p;
  PolicyForwardParams& params = p.params;
  check_value(hidden >= 16 && hidden <= 256 && hidden % 16 == 0, "hidden", hidden, "a multiple of 16 up to 256");
  check(heads >= 1 && hidden % heads == 0 && (hidden / heads) % 2 == 0,
        "ValueError: heads: expected hidden / heads to ", "be an even number, got ", hidden, " / ", heads);
  check_value(ffn >= 16 && ffn <= 1024 && ffn % 16 == 0, "ffn", ffn, "a multiple of 16 up to 1024");
  check_value(confidences >= 1 && confidences <= 64, "confidences", confidences, "1 to 64");
  params.sizes = PolicySizes{hidden, heads, ffn, confidences};
  check_value(mask.dim() == 2, "mask", shape_text(mask), "shape (B, L)");
  const int64_t batch = params.batch = mask.size(0), length = params.length = mask.size(1);
  p.mask = checked(mask, "mask", ScalarType::Bool, {batch, length}, mask);
  p.confidence = checked(confidence, "confidence", ScalarType::Float, {batch, length, confidences}, mask);
  p.time = checked(time, "time", ScalarType::Float, {batch}, mask);
  p.rows = checked(rows, "rows", ScalarType::Bool, {batch, length}, mask);
  p.cond = checked(cond, "cond", ScalarType::Float, {batch, hidden}, mask);
  p.packed = checked(packed, "packed", ScalarType::Float, {policy_weight_count(params.sizes)}, mask);
  p.logits = allocate({batch, length}, ScalarType::Float, mask);

  params.weights = read<float>(p.packed);
  params.mask = read<uint8_t>(p.mask);
  params.confidence = read<float>(p.confidence);
  params.time = read<float>(p.time);
  params.select = read_or_null<uint8_t>(p.rows);
  params.cond = read_or_null<float>(p.cond);
  params.logits = write<float>(p.logits);
  return p;
}

Tensor policy_forward_cpu(const Tensor& packed, int64_t hidden, int64_t heads, int64_t ffn, int64_t confidences,
                          const Tensor& mask, const Tensor& confidence, const Tensor& time, const OptionalTensor& rows,
                          const OptionalTensor& cond) {
  const Prepared p = prepare(packed, hidden, heads, ffn, confidences, mask, confidence, time, rows, cond);
  if (p.params.length == 0) return p.logits;
  // A sequence is always enough work for a thread of its own.
  torch::stable::parallel_for(0, p.params.batch, 1,
                              [&p](int64_t begin, int64_t end) { cpu::policy_forward(p.params, begin, end); });
  return p.logits;
}

#ifdef UNMASK_WITH_CUDA
Tensor policy_forward_cuda(const Tensor& packed, int64_t hidden, int64_t heads, int64_t ffn, int64_t confidences,
                           const Tensor& mask, const Tensor& confidence, const Tensor& time, const OptionalTensor& rows,
                           const OptionalTensor& cond) {
  torch::stable::accelerator::DeviceGuard guard(mask.get_device_index());
  const Prepared p = prepare(packed, hidden, heads, ffn, confidences, mask, confidence, time, rows, cond);
  if (p.params.batch == 0 || p.params.length == 0) return p.logits;
  const Tensor scratch = workspace(cuda::policy_forward_workspace(p.params), mask);
  check_cuda(cuda::policy_forward(p.params, scratch.mutable_data_ptr(), current_stream(mask)), "policy_forward");
  return p.logits;
}
#endif

}  // namespace
}  // namespace unmask

STABLE_TORCH_LIBRARY_IMPL(unmask, CPU, m) { m.impl("policy_forward", TORCH_BOX(&unmask::policy_forward_cpu)); }

#ifdef UNMASK_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(unmask, CUDA, m) { m.impl("policy_forward", TORCH_BOX(&unmask::policy_forward_cuda)); }
#endif
