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
  check(hidden >= 16 && hidden <= 256 && hidden % 16 == 0, "hidden: expected a multiple of 16 up to 256, got ", hidden);
  check(heads >= 1 && hidden % heads == 0 && (hidden / heads) % 2 == 0, "heads: hidden / heads must be an even number, ",
        "got ", hidden, " / ", heads);
  check(ffn >= 16 && ffn <= 1024 && ffn % 16 == 0, "ffn: expected a multiple of 16 up to 1024, got ", ffn);
  check(confidences >= 1 && confidences <= 64, "confidences: expected 1 to 64, got ", confidences);
  params.sizes = PolicySizes{hidden, heads, ffn, confidences};

  check(mask.dim() == 2, "mask: expected shape (B, L), got ", shape_text(mask));
  params.batch = mask.size(0);
  params.length = mask.size(1);
  check(params.length >= 1, "mask: the length must be at least 1, got ", shape_text(mask));
  check_shape(confidence, {params.batch, params.length, confidences}, "confidence");
  check_shape(time, {params.batch}, "time");
  const int64_t positions = params.batch * params.length;
  p.packed = prepared(packed, ScalarType::Float, policy_weight_count(params.sizes), mask, "packed weights", "float32");
  p.mask = prepared(mask, ScalarType::Bool, positions, mask, "mask", "bool");
  p.confidence = prepared(confidence, ScalarType::Float, positions * confidences, mask, "confidence", "float32");
  p.time = prepared(time, ScalarType::Float, params.batch, mask, "time", "float32");
  if (rows.has_value()) {
    check_shape(*rows, {params.batch, params.length}, "rows");
    p.rows = prepared(*rows, ScalarType::Bool, positions, mask, "rows", "bool");
  }
  if (cond.has_value()) {
    check_shape(*cond, {params.batch, hidden}, "cond");
    p.cond = prepared(*cond, ScalarType::Float, params.batch * hidden, mask, "cond", "float32");
  }
  p.logits = allocate({params.batch, params.length}, ScalarType::Float, mask);

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
  Prepared p = prepare(packed, hidden, heads, ffn, confidences, mask, confidence, time, rows, cond);
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
  Prepared p = prepare(packed, hidden, heads, ffn, confidences, mask, confidence, time, rows, cond);
  if (p.params.batch == 0) return p.logits;
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
