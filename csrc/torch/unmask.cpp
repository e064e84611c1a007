// unmask::unmask_: from tensors to UnmaskParams.
#include "ops/unmask.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "checks.h"

namespace unmask {
namespace {

// The numbers of one call, as the schema lists them.
struct Settings {
  int64_t start, block_length, max_steps, mode;
  const std::vector<int64_t>& eos;
  double temperature, scale, stop_logit;
};

// Tensors that must outlive the launch, and what it returns.
struct Prepared {
  UnmaskParams params{};
  Tensor candidates, action, rank;
};

// One of the state tensors that are written in place.
template <typename T>
T* in_place(const Tensor& t, const char* name, ScalarType dtype, const Shape& shape, const Tensor& tokens) {
  check_tensor(t, name, dtype, shape, tokens);
  check_value(t.is_contiguous(), name, strides_text(t), "a contiguous tensor, as it is written in place");
  return write<T>(t);
}

void set_numbers(const Settings& s, int64_t width, UnmaskParams* params) {
  const int64_t room = width - params->length;
  check(s.start >= 0 && s.start <= room, "ValueError: start: expected 0 to ", room, ", got ", s.start);
  check_value(s.block_length >= 1, "block_length", s.block_length, "at least 1");
  check_value(s.max_steps >= 1, "max_steps", s.max_steps, "at least 1");
  check_value(s.mode >= 0 && s.mode <= static_cast<int64_t>(ActionMode::kDpls), "action_mode", s.mode, "0 to 4");
  check_value(s.eos.size() <= kMaxStops, "eos", s.eos.size(), "at most 16 ids");
  for (const int64_t id : s.eos) check_value(id >= 0, "eos", id, "ids of at least 0");
  check_value(s.temperature > 0.0 && s.temperature <= 1e30, "temperature", s.temperature,
              "a number above 0 and up to 1e30");
  check_value(s.scale >= 0.0 && s.scale <= 1e30, "scale", s.scale, "a number from 0 to 1e30");
  check_value(s.stop_logit >= -1e30 && s.stop_logit <= 1e30, "stop_logit", s.stop_logit, "a number from -1e30 to 1e30");
  params->start = s.start;
  params->block_length = s.block_length;
  params->max_steps = s.max_steps;
  params->mode = static_cast<ActionMode>(s.mode);
  params->num_stops = static_cast<int>(s.eos.size());
  std::copy(s.eos.begin(), s.eos.end(), params->stops);
  params->temperature = static_cast<float>(s.temperature);
  params->scale = static_cast<float>(s.scale);
  params->stop_logit = static_cast<float>(s.stop_logit);
}

Prepared prepare(const Tensor& tokens, const Tensor& mask, const Tensor& allowed, const Tensor& rows,
                 const Tensor& candidates, const Tensor& action, const Settings& settings, const OptionalTensor& seed) {
  Prepared p;
  UnmaskParams& params = p.params;
  check_value(tokens.dim() == 2, "tokens", shape_text(tokens), "shape (B, T)");
  check_value(mask.dim() == 2 && mask.size(1) >= 1, "mask", shape_text(mask), "shape (B, L) with L >= 1");
  const int64_t batch = tokens.size(0), width = tokens.size(1), length = mask.size(1);
  params.batch = batch;
  params.length = length;
  check_tensor(tokens, "tokens", ScalarType::Long, {batch, width}, tokens);
  check_value((width <= 1 || tokens.stride(1) == 1) && (batch <= 1 || std::abs(tokens.stride(0)) >= width), "tokens",
              strides_text(tokens), "contiguous rows that do not overlap, as they are written in place");
  params.canvas_stride = tokens.stride(0);
  params.mask = in_place<uint8_t>(mask, "mask", ScalarType::Bool, {batch, length}, tokens);
  params.allowed = in_place<uint8_t>(allowed, "allowed", ScalarType::Bool, {batch, length}, tokens);
  params.rows = in_place<int64_t>(rows, "rows", ScalarType::Long, {batch, kRowColumns}, tokens);
  p.candidates = checked(candidates, "candidates", ScalarType::Long, {batch, length}, tokens);
  set_numbers(settings, width, &params);
  const bool decided = params.mode == ActionMode::kSelect && action.scalar_type() == ScalarType::Bool;
  p.action = checked(action, "action", decided ? ScalarType::Bool : ScalarType::Float, {batch, length}, tokens);
  if (decided) {
    params.decision = read<uint8_t>(p.action);
  } else {
    params.score = read<float>(p.action);
  }
  params.seed = checked_seed(seed, params.mode != ActionMode::kSelect && params.mode != ActionMode::kGreedy, tokens);
  p.rank = allocate({batch, length}, ScalarType::Int, tokens);
  params.candidates = read<int64_t>(p.candidates);
  params.tokens = write<int64_t>(tokens);
  params.rank = write<int32_t>(p.rank);
  return p;
}

Tensor unmask_cpu(const Tensor& tokens, const Tensor& mask, const Tensor& allowed, const Tensor& rows,
                  const Tensor& candidates, const Tensor& action, int64_t start, int64_t block_length,
                  int64_t max_steps, int64_t mode, const std::vector<int64_t>& eos, double temperature, double scale,
                  double stop_logit, const OptionalTensor& seed) {
  const Settings settings{start, block_length, max_steps, mode, eos, temperature, scale, stop_logit};
  const Prepared p = prepare(tokens, mask, allowed, rows, candidates, action, settings, seed);
  torch::stable::parallel_for(0, p.params.batch, grain_size(32 * p.params.length),
                              [&p](int64_t begin, int64_t end) { cpu::unmask(p.params, begin, end); });
  return p.rank;
}

#ifdef UNMASK_WITH_CUDA
Tensor unmask_cuda(const Tensor& tokens, const Tensor& mask, const Tensor& allowed, const Tensor& rows,
                   const Tensor& candidates, const Tensor& action, int64_t start, int64_t block_length,
                   int64_t max_steps, int64_t mode, const std::vector<int64_t>& eos, double temperature, double scale,
                   double stop_logit, const OptionalTensor& seed) {
  torch::stable::accelerator::DeviceGuard guard(tokens.get_device_index());
  const Settings settings{start, block_length, max_steps, mode, eos, temperature, scale, stop_logit};
  const Prepared p = prepare(tokens, mask, allowed, rows, candidates, action, settings, seed);
  if (p.params.batch == 0) return p.rank;
  check_cuda(cuda::unmask(p.params, current_stream(tokens)), "unmask_");
  return p.rank;
}
#endif

}  // namespace
}  // namespace unmask

STABLE_TORCH_LIBRARY_IMPL(unmask, CPU, m) { m.impl("unmask_", TORCH_BOX(&unmask::unmask_cpu)); }

#ifdef UNMASK_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(unmask, CUDA, m) { m.impl("unmask_", TORCH_BOX(&unmask::unmask_cuda)); }
#endif
