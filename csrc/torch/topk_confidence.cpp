// unmask::topk_confidence: from tensors to TopkConfidenceParams.
#include "ops/topk_confidence.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <functional>
#include <numeric>
#include <tuple>

#include "checks.h"

namespace unmask {
namespace {

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

DType kernel_dtype(const Tensor& logits) {
  const ScalarType dtype = logits.scalar_type();
  check(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
        "TypeError: logits: expected float32, bfloat16 or float16, got ", dtype_name(dtype));
  if (dtype == ScalarType::Float) return DType::kFloat32;
  return dtype == ScalarType::Half ? DType::kFloat16 : DType::kBFloat16;
}

// Describes the leading dimensions of `logits` as (outer, inner) with one stride each; false if that takes a copy.
bool collapse(const Tensor& logits, TopkConfidenceParams* params) {
  const int64_t last = logits.dim() - 1;
  if (logits.size(last) > 1 && logits.stride(last) != 1) return false;
  int64_t sizes[2] = {1, 1}, strides[2] = {0, 0};  // [0] = inner, [1] = outer
  int group = 0;
  bool empty_group = true;
  for (int64_t axis = last - 1; axis >= 0; --axis) {
    const int64_t size = logits.size(axis), stride = logits.stride(axis);
    if (size == 1) continue;
    if (empty_group) {
      sizes[group] = size;
      strides[group] = stride;
      empty_group = false;
    } else if (stride == strides[group] * sizes[group]) {
      sizes[group] *= size;
    } else if (group == 0) {
      group = 1;
      sizes[1] = size;
      strides[1] = stride;
    } else {
      return false;
    }
  }
  params->inner = sizes[0];
  params->stride_inner = strides[0];
  params->stride_outer = strides[1];
  return true;
}

// Tensors that must outlive the launch, and what it returns.
struct Prepared {
  TopkConfidenceParams params{};
  Tensor logits;
  OptionalTensor rows, select, counter;
  Outputs outputs;
};

void set_candidates(std::vector<int64_t> exclude, int64_t k, TopkConfidenceParams* params) {
  std::sort(exclude.begin(), exclude.end());
  exclude.erase(std::unique(exclude.begin(), exclude.end()), exclude.end());
  check_value(exclude.size() <= kMaxExclude, "exclude", exclude.size(), "at most 16 ids");
  for (int64_t id : exclude) {
    check(id >= 0 && id < params->vocab, "ValueError: exclude: expected ids in [0, ", params->vocab, "), got ", id);
  }
  std::copy(exclude.begin(), exclude.end(), params->exclude);
  params->num_exclude = static_cast<int>(exclude.size());
  const int64_t candidates = params->vocab - params->num_exclude, most = std::min<int64_t>(kMaxTopK, candidates);
  check(k >= 1 && k <= most, "ValueError: k: expected 1 to ", most, " (at most ", kMaxTopK, ", and ", candidates,
        " candidates), got ", k);
  params->k = static_cast<int>(k);
}

void check_row_ids(const TopkConfidenceParams& params) {
  for (int64_t i = 0; i < params.num_rows; ++i) {
    check(params.rows[i] >= 0 && params.rows[i] < params.num_source_rows, "ValueError: rows: expected indices in [0, ",
          params.num_source_rows, "), got ", params.rows[i], " at ", i);
  }
}

Prepared prepare(const Tensor& logits, int64_t k, const OptionalTensor& rows, const OptionalTensor& select,
                 double temperature, const OptionalTensor& seed, const OptionalTensor& counter,
                 const std::vector<int64_t>& exclude, bool logsumexp, bool entropy) {
  Prepared p;
  TopkConfidenceParams& params = p.params;
  const int64_t dims = logits.dim();
  params.dtype = kernel_dtype(logits);
  check_value(dims >= 1 && logits.size(dims - 1) >= 1, "logits", shape_text(logits), "shape (..., V) with V >= 1");
  params.vocab = logits.size(dims - 1);
  check_value(params.vocab < (int64_t{1} << 31), "logits", params.vocab, "a vocabulary below 2^31");
  std::vector<int64_t> shape(logits.sizes().begin(), logits.sizes().end() - 1);
  params.num_source_rows = std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<int64_t>());
  p.logits = logits;
  if (!collapse(p.logits, &params)) {
    p.logits = torch::stable::contiguous(logits);
    collapse(p.logits, &params);
  }
  set_candidates(exclude, k, &params);

  params.num_rows = params.num_source_rows;
  check(!rows.has_value() || !select.has_value(), "ValueError: rows: expected indices or flags, got both");
  p.select = checked(select, "rows", ScalarType::Bool, shape, logits);
  params.select = read_or_null<uint8_t>(p.select);
  if (rows.has_value()) {
    const bool indices = rows->dim() == 1 || rows->scalar_type() != ScalarType::Long;
    check_value(indices, "rows", shape_text(*rows), "shape (R,)");
    params.num_rows = rows->numel();
    shape = {params.num_rows};
    p.rows = checked(rows, "rows", ScalarType::Long, shape, logits);
    params.rows = read<int64_t>(*p.rows);
    if (logits.is_cpu()) check_row_ids(params);
  }

  check_value(temperature == 0.0 || (temperature >= 1e-30 && temperature <= 1e30), "temperature", temperature,
              "0 or 1e-30 to 1e30");
  params.inverse_temperature = temperature > 0.0 ? static_cast<float>(1.0 / temperature) : 0.0f;
  params.seed = checked_seed(seed, temperature > 0.0, logits);
  std::vector<int64_t> shape_3(shape), shape_k(shape);
  shape_3.push_back(3);
  p.counter = checked(counter, "counter", ScalarType::Long, shape_3, logits);
  params.counter = read_or_null<int64_t>(p.counter);

  shape_k.push_back(k);
  const std::vector<int64_t> none = {0};
  p.outputs = Outputs(allocate(shape_k, ScalarType::Float, logits), allocate(shape_k, ScalarType::Long, logits),
                      allocate(shape, ScalarType::Long, logits), allocate(shape, ScalarType::Float, logits),
                      allocate(logsumexp ? shape : none, ScalarType::Float, logits),
                      allocate(entropy ? shape : none, ScalarType::Float, logits));
  params.logits = p.logits.const_data_ptr();
  params.confidence = write<float>(std::get<0>(p.outputs));
  params.token = write<int64_t>(std::get<1>(p.outputs));
  params.sample = write<int64_t>(std::get<2>(p.outputs));
  params.sample_confidence = write<float>(std::get<3>(p.outputs));
  params.logsumexp = logsumexp ? write<float>(std::get<4>(p.outputs)) : nullptr;
  params.entropy = entropy ? write<float>(std::get<5>(p.outputs)) : nullptr;
  return p;
}

Outputs topk_confidence_cpu(const Tensor& logits, int64_t k, const OptionalTensor& rows, const OptionalTensor& select,
                            double temperature, const OptionalTensor& seed, const OptionalTensor& counter,
                            const std::vector<int64_t>& exclude, bool logsumexp, bool entropy) {
  const Prepared p = prepare(logits, k, rows, select, temperature, seed, counter, exclude, logsumexp, entropy);
  torch::stable::parallel_for(0, p.params.num_rows, grain_size(p.params.vocab),
                              [&p](int64_t begin, int64_t end) { cpu::topk_confidence(p.params, begin, end); });
  return p.outputs;
}

#ifdef UNMASK_WITH_CUDA
Outputs topk_confidence_cuda(const Tensor& logits, int64_t k, const OptionalTensor& rows, const OptionalTensor& select,
                             double temperature, const OptionalTensor& seed, const OptionalTensor& counter,
                             const std::vector<int64_t>& exclude, bool logsumexp, bool entropy) {
  torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  const Prepared p = prepare(logits, k, rows, select, temperature, seed, counter, exclude, logsumexp, entropy);
  if (p.params.num_rows == 0) return p.outputs;
  const Tensor scratch = workspace(cuda::topk_confidence_workspace(p.params), logits);
  check_cuda(cuda::topk_confidence(p.params, scratch.mutable_data_ptr(), current_stream(logits)), "topk_confidence");
  return p.outputs;
}
#endif

}  // namespace
}  // namespace unmask

STABLE_TORCH_LIBRARY_IMPL(unmask, CPU, m) { m.impl("topk_confidence", TORCH_BOX(&unmask::topk_confidence_cpu)); }

#ifdef UNMASK_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(unmask, CUDA, m) { m.impl("topk_confidence", TORCH_BOX(&unmask::topk_confidence_cuda)); }
#endif
