// Which dtypes of logits the kernels take.
#pragma once
#include "checks.h"
#include "ops/topk_confidence.h"

namespace unmask {

inline DType kernel_dtype(const Tensor& logits) {
  const ScalarType dtype = logits.scalar_type();
  check(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
        "TypeError: logits: expected float32, bfloat16 or float16, got ", dtype_name(dtype));
  if (dtype == ScalarType::Float) return DType::kFloat32;
  return dtype == ScalarType::Half ? DType::kFloat16 : DType::kBFloat16;
}

}  // namespace unmask
