// unmask::unmask_: from tensors to UnmaskParams.
#include "ops/unmask.h"

#include <torch/csrc/stable/library.h>

#include "checks.h"

namespace unmask {
namespace {

// The numbers of one call, as the schema lists them.
struct Settings {
  int64_t start, block_length, max_steps, mode, eos;
  double temperature, scale, stop_logit;
};

// Tensors that must outlive the launch, and what it returns.
struct Prepared {
  UnmaskParams params{};
  Tensor token, score, rank;
  OptionalTensor seed, sequence;
};

// One of the state tensors that are written in place.
template <typename T>
T* state(const Tensor& t, std::initializer_list<int64_t> shape, ScalarType dtype, const Tensor& tokens,
         const char* name, const char* dtype_name) {
  check_dtype(t, dtype, name, dtype_name);
  check_shape(t, shape, name);
  check_same_device(t, tokens, name);
  check_contiguous(t, name);
  return write<T>(t);
}

void set_numbers(const Settings& s, const Tensor& tokens, UnmaskParams* params) {
  const int64_t length = params->length;
  check(length >= 1, "token: the length must be at least 1");
  check(s.start >= 0 && s.start + length <= tokens.size(1), "start: positions ", s.start, " to ", s.start + length,
        " are outside a canvas of ", tokens.size(1));
  check(s.block_length >= 1 && s.block_length <= length, "block_length: expected 1 to ", length, ", got ",
        s.block_length);
  check(s.max_steps >= 1, "max_steps: expected at least 1, got ", s.max_steps);
  check(s.mode >= 0 && s.mode <= static_cast<int64_t>(ActionMode::kDpls), "mode: unknown number ", s.mode);
  check(s.temperature > 0.0 && s.temperature <= 1e30, "temperature: expected a finite number > 0, got ", s.temperature);
  check(s.scale >= 0.0 && s.scale <= 1e30, "scale: expected a finite number >= 0, got ", s.scale);
  check(s.stop_logit >= -1e30 && s.stop_logit <= 1e30, "stop_logit: expected a finite number, got ", s.stop_logit);
  params->start = s.start;
  params->block_length = s.block_length;
  params->max_steps = s.max_steps;
  params->eos = s.eos;
  params->mode = static_cast<ActionMode>(s.mode);
  params->temperature = static_cast<float>(s.temperature);
  params->scale = static_cast<float>(s.scale);
  params->stop_logit = static_cast<float>(s.stop_logit);
}

Prepared prepare(const Tensor& tokens, const Tensor& token, const Tensor& score, const Tensor& mask,
                 const Tensor& allowed, const Tensor& steps, const Tensor& remaining, const Tensor& block,
                 const Tensor& done, const Tensor& status, const Settings& settings, const OptionalTensor& seed,
                 const OptionalTensor& sequence) {
  Prepared p;
  UnmaskParams& params = p.params;
  check(tokens.dim() == 2, "tokens: expected shape (B, T), got ", shape_text(tokens));
  check_dtype(tokens, ScalarType::Long, "tokens", "int64");
  check(tokens.size(1) <= 1 || tokens.stride(1) == 1, "tokens: the last dimension must be contiguous");
  check(token.dim() == 2, "token: expected shape (B, L), got ", shape_text(token));
  const int64_t batch = tokens.size(0), length = token.size(1);
  params.batch = batch;
  params.length = length;
  params.canvas_stride = tokens.stride(0);
  set_numbers(settings, tokens, &params);
  check_shape(token, {batch, length}, "token");
  check_shape(score, {batch, length}, "score");
  p.token = prepared(token, ScalarType::Long, batch * length, tokens, "token", "int64");
  p.score = prepared(score, ScalarType::Float, batch * length, tokens, "score", "float32");
  const bool draws = params.mode == ActionMode::kBernoulli || params.mode == ActionMode::kBernoulliArgmax ||
                     params.mode == ActionMode::kDpls;
  check(!draws || seed.has_value(), "seed: needed by this mode");
  if (seed.has_value()) p.seed = prepared(*seed, ScalarType::Long, 1, tokens, "seed", "int64");
  if (sequence.has_value()) p.sequence = prepared(*sequence, ScalarType::Long, batch, tokens, "sequence", "int64");
  p.rank = allocate({batch, length}, ScalarType::Int, tokens);

  params.seed = read_or_null<int64_t>(p.seed);
  params.sequence = read_or_null<int64_t>(p.sequence);
  params.token = read<int64_t>(p.token);
  params.score = read<float>(p.score);
  params.tokens = write<int64_t>(tokens);
  params.mask = state<uint8_t>(mask, {batch, length}, ScalarType::Bool, tokens, "mask", "bool");
  params.allowed = state<uint8_t>(allowed, {batch, length}, ScalarType::Bool, tokens, "allowed", "bool");
  params.steps = state<int64_t>(steps, {batch}, ScalarType::Long, tokens, "steps", "int64");
  params.remaining = state<int64_t>(remaining, {batch}, ScalarType::Long, tokens, "remaining", "int64");
  params.block = state<int64_t>(block, {batch}, ScalarType::Long, tokens, "block", "int64");
  params.done = state<uint8_t>(done, {batch}, ScalarType::Bool, tokens, "done", "bool");
  params.status = state<int32_t>(status, {batch}, ScalarType::Int, tokens, "status", "int32");
  params.rank = write<int32_t>(p.rank);
  return p;
}

Tensor unmask_cpu(const Tensor& tokens, const Tensor& token, const Tensor& score, const Tensor& mask,
                  const Tensor& allowed, const Tensor& steps, const Tensor& remaining, const Tensor& block,
                  const Tensor& done, const Tensor& status, int64_t start, int64_t block_length, int64_t max_steps,
                  int64_t mode, int64_t eos, double temperature, double scale, double stop_logit,
                  const OptionalTensor& seed, const OptionalTensor& sequence) {
  const Settings settings{start, block_length, max_steps, mode, eos, temperature, scale, stop_logit};
  Prepared p =
      prepare(tokens, token, score, mask, allowed, steps, remaining, block, done, status, settings, seed, sequence);
  torch::stable::parallel_for(0, p.params.batch, grain_size(32 * p.params.length),
                              [&p](int64_t begin, int64_t end) { cpu::unmask(p.params, begin, end); });
  return p.rank;
}

#ifdef UNMASK_WITH_CUDA
Tensor unmask_cuda(const Tensor& tokens, const Tensor& token, const Tensor& score, const Tensor& mask,
                   const Tensor& allowed, const Tensor& steps, const Tensor& remaining, const Tensor& block,
                   const Tensor& done, const Tensor& status, int64_t start, int64_t block_length, int64_t max_steps,
                   int64_t mode, int64_t eos, double temperature, double scale, double stop_logit,
                   const OptionalTensor& seed, const OptionalTensor& sequence) {
  torch::stable::accelerator::DeviceGuard guard(tokens.get_device_index());
  const Settings settings{start, block_length, max_steps, mode, eos, temperature, scale, stop_logit};
  Prepared p =
      prepare(tokens, token, score, mask, allowed, steps, remaining, block, done, status, settings, seed, sequence);
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
