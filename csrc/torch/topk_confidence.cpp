// unmask::topk_confidence: from tensors to TopkConfidenceParams.
#include "ops/topk_confidence.h"

#include <algorithm>
#include <functional>
#include <numeric>
#include <tuple>

#include "torch/logits.h"

namespace unmask {
namespace {

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Describes the leading dimensions of `logits` as (outer, inner) with one stride each; false if that takes a copy.
bool collapse(const Tensor& logits, TopkConfidenceParams* params) {
  const int64_t dims = logits.dim();
  const bool contiguous = logits.is_contiguous();
  if (!contiguous && (dims > 3 || (params->vocab > 1 && logits.stride(dims - 1) != 1))) return false;
  params->inner = contiguous || dims == 1 ? params->num_source_rows : logits.size(dims - 2);
  params->stride_inner = contiguous || dims == 1 ? params->vocab : logits.stride(dims - 2);
  params->stride_outer = contiguous || dims < 3 ? 0 : logits.stride(0);
  return true;
}

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

// `logits` as rows: itself, or a contiguous copy.
Tensor set_logits(const Tensor& logits, TopkConfidenceParams* params) {
  const int64_t dims = logits.dim();
  params->dtype = kernel_dtype(logits);
  check_value(dims >= 1 && logits.size(dims - 1) >= 1, "logits", logits.sizes(), "shape (..., V) with V >= 1");
  params->vocab = logits.size(dims - 1);
  check_value(params->vocab < (int64_t{1} << 31), "logits", params->vocab, "a vocabulary below 2^31");
  const auto sizes = logits.sizes();
  params->num_source_rows = std::accumulate(sizes.begin(), sizes.end() - 1, int64_t{1}, std::multiplies<int64_t>());
  const Tensor rows = collapse(logits, params) ? logits : torch::stable::contiguous(logits);
  collapse(rows, params);
  params->logits = rows.const_data_ptr();
  return rows;
}

// The rows to produce, and `shape`, the shape of the results without k.
void set_rows(const OptionalTensor& rows, const OptionalTensor& select, Arguments* in, std::vector<int64_t>* shape,
              TopkConfidenceParams* params) {
  params->num_rows = rows ? rows->numel() : params->num_source_rows;
  if (rows) {
    const bool indices = rows->dim() == 1 || rows->scalar_type() != ScalarType::Long;
    check_value(indices, "rows", rows->sizes(), "shape (R,)");
    *shape = {params->num_rows};
    params->rows = in->read<int64_t>(*rows, "rows", *shape);
  }
  params->select = in->read<uint8_t>(select, rows ? "read" : "rows", *shape);
  for (int64_t i = 0; rows && rows->is_cpu() && i < params->num_rows; ++i) {
    if (params->select && !params->select[i]) continue;
    check(params->rows[i] >= 0 && params->rows[i] < params->num_source_rows,
          "ValueError: rows: expected indices in [0, ", params->num_source_rows, "), got ", params->rows[i], " at ", i);
  }
}

template <bool kCuda>
Outputs topk_confidence(const Tensor& logits, int64_t k, const OptionalTensor& rows, const OptionalTensor& select,
                        double temperature, const OptionalTensor& seed, const OptionalTensor& counter,
                        const std::vector<int64_t>& exclude, bool logsumexp, bool entropy) {
  [[maybe_unused]] const auto scope = device_scope<kCuda>(logits);
  Arguments in(logits);
  TopkConfidenceParams params{};
  const Tensor kept = set_logits(logits, &params);
  set_candidates(exclude, k, &params);
  std::vector<int64_t> shape(logits.sizes().begin(), logits.sizes().end() - 1);
  set_rows(rows, select, &in, &shape, &params);
  check_value(temperature == 0.0 || (temperature >= 1e-30 && temperature <= 1e30), "temperature", temperature,
              "0 or 1e-30 to 1e30");
  params.inverse_temperature = temperature > 0.0 ? static_cast<float>(1.0 / temperature) : 0.0f;
  params.seed = in.read_seed(seed, temperature > 0.0);
  std::vector<int64_t> shape_3(shape), shape_k(shape);
  shape_3.push_back(3);
  shape_k.push_back(k);
  params.counter = in.read<int64_t>(counter, "counter", shape_3);

  const auto statistic = [&](bool wanted, float** data) {
    const Tensor t = allocate(wanted ? shape : std::vector<int64_t>{0}, ScalarType::Float, logits);
    *data = wanted ? write<float>(t) : nullptr;
    return t;
  };
  const Tensor confidence = allocate(shape_k, ScalarType::Float, logits);
  const Tensor token = allocate(shape_k, ScalarType::Long, logits);
  const Tensor sample = allocate(shape, ScalarType::Long, logits);
  params.confidence = write<float>(confidence);
  params.token = write<int64_t>(token);
  params.sample = write<int64_t>(sample);
  const Outputs outputs(confidence, token, sample, statistic(true, &params.sample_confidence),
                        statistic(logsumexp, &params.logsumexp), statistic(entropy, &params.entropy));
  if constexpr (kCuda) {
    if (params.num_rows == 0) return outputs;
    const Tensor scratch = workspace(cuda::topk_confidence_workspace(params), logits);
    check_cuda(cuda::topk_confidence(params, scratch.mutable_data_ptr(), current_stream(logits)), "topk_confidence");
  } else {
    torch::stable::parallel_for(0, params.num_rows, grain_size(params.vocab),
                                [&params](int64_t begin, int64_t end) { cpu::topk_confidence(params, begin, end); });
  }
  return outputs;
}

}  // namespace
}  // namespace unmask

STABLE_TORCH_LIBRARY_IMPL(unmask, CPU, m) { m.impl("topk_confidence", TORCH_BOX(&unmask::topk_confidence<false>)); }

#ifdef UNMASK_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(unmask, CUDA, m) { m.impl("topk_confidence", TORCH_BOX(&unmask::topk_confidence<true>)); }
#endif
