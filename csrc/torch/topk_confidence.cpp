// unmask::topk_confidence: from tensors to TopkConfidenceParams.
#include "ops/topk_confidence.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "checks.h"

namespace unmask {
namespace {

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

DType kernel_dtype(const Tensor& logits) {
  switch (logits.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      check(false, "logits: expected float32, bfloat16 or float16");
      return DType::kFloat32;
  }
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
  OptionalTensor rows, select, seed, counter;
  Outputs outputs;
};

void set_exclude(const std::vector<int64_t>& exclude, TopkConfidenceParams* params) {
  std::vector<int64_t> ids(exclude);
  std::sort(ids.begin(), ids.end());
  ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
  check(ids.size() <= static_cast<size_t>(kMaxExclude), "exclude: at most ", kMaxExclude, " ids, got ", ids.size());
  for (int64_t id : ids) check(id >= 0 && id < params->vocab, "exclude: id ", id, " is outside [0, ", params->vocab, ")");
  std::copy(ids.begin(), ids.end(), params->exclude);
  params->num_exclude = static_cast<int>(ids.size());
}

void check_row_ids(const TopkConfidenceParams& params) {
  for (int64_t i = 0; i < params.num_rows; ++i) {
    check(params.rows[i] >= 0 && params.rows[i] < params.num_source_rows, "rows: ", params.rows[i], " at ", i,
          " is outside [0, ", params.num_source_rows, ")");
  }
}

Prepared prepare(const Tensor& logits, int64_t k, const OptionalTensor& rows, const OptionalTensor& select,
                 double temperature, const OptionalTensor& seed, const OptionalTensor& counter,
                 const std::vector<int64_t>& exclude, bool logsumexp, bool entropy) {
  Prepared p;
  TopkConfidenceParams& params = p.params;
  const int64_t dims = logits.dim();
  check(dims >= 1, "logits: expected at least one dimension");
  params.dtype = kernel_dtype(logits);
  params.vocab = logits.size(dims - 1);
  check(params.vocab >= 1 && params.vocab < (int64_t{1} << 31), "logits: the last dimension must be in [1, 2^31), got ",
        params.vocab);
  params.num_source_rows = 1;
  std::vector<int64_t> shape;
  for (int64_t axis = 0; axis < dims - 1; ++axis) {
    shape.push_back(logits.size(axis));
    params.num_source_rows *= logits.size(axis);
  }
  p.logits = logits;
  if (!collapse(p.logits, &params)) {
    p.logits = torch::stable::contiguous(logits);
    collapse(p.logits, &params);
  }

  params.num_rows = params.num_source_rows;
  if (rows.has_value()) {
    check(!select.has_value(), "rows and select exclude each other");
    check(rows->dim() == 1, "rows: expected shape (R,), got ", shape_text(*rows));
    p.rows = prepared(*rows, ScalarType::Long, rows->numel(), logits, "rows", "int64");
    params.num_rows = rows->numel();
    params.rows = read<int64_t>(*p.rows);
    shape = {params.num_rows};
    if (logits.is_cpu()) check_row_ids(params);
  } else if (select.has_value()) {
    p.select = prepared(*select, ScalarType::Bool, params.num_rows, logits, "select", "bool");
    params.select = read<uint8_t>(*p.select);
  }

  set_exclude(exclude, &params);
  check(k >= 1 && k <= kMaxTopK && k <= params.vocab - params.num_exclude, "k: expected 1 to ", kMaxTopK,
        " and at most the number of candidates ", params.vocab - params.num_exclude, ", got ", k);
  params.k = static_cast<int>(k);

  check(temperature >= 0.0 && temperature <= 1e30, "temperature: expected a finite number >= 0, got ", temperature);
  if (temperature > 0.0) {
    params.inverse_temperature = static_cast<float>(1.0 / temperature);
    check(params.inverse_temperature > 0.0f && params.inverse_temperature <= 1e30f, "temperature: ", temperature,
          " is too close to 0; use 0 for the most likely token");
    check(seed.has_value(), "seed: needed at temperature > 0");
    p.seed = prepared(*seed, ScalarType::Long, 1, logits, "seed", "int64");
    params.seed = read<int64_t>(*p.seed);
    if (counter.has_value()) {
      p.counter = prepared(*counter, ScalarType::Long, 3 * params.num_rows, logits, "counter", "int64");
      params.counter = read<int64_t>(*p.counter);
    }
  }

  std::vector<int64_t> shape_k(shape);
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
  Prepared p = prepare(logits, k, rows, select, temperature, seed, counter, exclude, logsumexp, entropy);
  torch::stable::parallel_for(
      0, p.params.num_rows, grain_size(p.params.vocab),
      [&p](int64_t begin, int64_t end) { cpu::topk_confidence(p.params, begin, end); });
  return p.outputs;
}

#ifdef UNMASK_WITH_CUDA
Outputs topk_confidence_cuda(const Tensor& logits, int64_t k, const OptionalTensor& rows, const OptionalTensor& select,
                             double temperature, const OptionalTensor& seed, const OptionalTensor& counter,
                             const std::vector<int64_t>& exclude, bool logsumexp, bool entropy) {
  torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  Prepared p = prepare(logits, k, rows, select, temperature, seed, counter, exclude, logsumexp, entropy);
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
