// unmask::unmask_: from tensors to UnmaskParams.
#include "ops/unmask.h"

#include <algorithm>

#include "checks.h"

namespace unmask {
namespace {

void set_numbers(UnmaskParams* params, int64_t width, int64_t start, int64_t block_length, int64_t max_steps,
                 int64_t mode, const std::vector<int64_t>& eos, const std::optional<int64_t>& max_post) {
  const int64_t room = width - params->length;
  check(start >= 0 && start <= room, "ValueError: start: expected 0 to ", room, ", got ", start);
  check_value(block_length >= 1, "block_length", block_length, "at least 1");
  check_value(max_steps >= 1, "max_steps", max_steps, "at least 1");
  check_value(mode >= 0 && mode <= static_cast<int64_t>(ActionMode::kDpls), "action_mode", mode, "0 to 4");
  check_value(eos.size() <= kMaxStops, "eos", eos.size(), "at most 16 ids");
  for (const int64_t id : eos) check_value(id >= 0, "eos", id, "ids of at least 0");
  check_value(!max_post || *max_post >= 0, "max_post", max_post.value_or(0), "at least 0, or None");
  params->start = start;
  params->block_length = block_length;
  params->max_steps = max_steps;
  params->max_post = max_post.value_or(-1);
  params->mode = static_cast<ActionMode>(mode);
  params->num_stops = static_cast<int>(eos.size());
  std::copy(eos.begin(), eos.end(), params->stops);
}

void set_odds(UnmaskParams* params, double temperature, double scale, double stop_logit) {
  check_value(temperature >= 1e-30 && temperature <= 1e30, "temperature", temperature, "1e-30 to 1e30");
  check_value(scale >= 0.0 && scale <= 1e30, "scale", scale, "a number from 0 to 1e30");
  check_value(stop_logit >= -1e30 && stop_logit <= 1e30, "stop_logit", stop_logit, "a number from -1e30 to 1e30");
  params->temperature = static_cast<float>(temperature);
  params->scale = static_cast<float>(scale);
  params->stop_logit = static_cast<float>(stop_logit);
}

template <bool kCuda>
Tensor unmask_(const Tensor& tokens, const Tensor& mask, const Tensor& allowed, const Tensor& rows,
               const Tensor& candidates, const Tensor& action, int64_t start, int64_t block_length, int64_t max_steps,
               int64_t mode, const std::vector<int64_t>& eos, double temperature, double scale, double stop_logit,
               const OptionalTensor& seed, const OptionalTensor& revise, const OptionalTensor& editable,
               const std::optional<int64_t>& max_post, bool everywhere, bool settled_stop) {
  [[maybe_unused]] const auto scope = device_scope<kCuda>(tokens);
  check_value(tokens.dim() == 2, "tokens", tokens.sizes(), "shape (B, T)");
  check_value(mask.dim() == 2 && mask.size(1) >= 1, "mask", mask.sizes(), "shape (B, L) with L >= 1");
  const int64_t batch = tokens.size(0), width = tokens.size(1), length = mask.size(1);
  Arguments in(tokens);
  UnmaskParams params{};
  params.batch = batch;
  params.length = length;
  in.check_tensor<int64_t>(tokens, "tokens", {batch, width});
  check_value((width <= 1 || tokens.stride(1) == 1) && (batch <= 1 || std::abs(tokens.stride(0)) >= width), "tokens",
              tokens.strides(), "contiguous rows that do not overlap, as they are written in place");
  params.tokens = write<int64_t>(tokens);
  params.canvas_stride = tokens.stride(0);
  params.mask = in.write<uint8_t>(mask, "mask", {batch, length});
  params.allowed = in.write<uint8_t>(allowed, "allowed", {batch, length});
  params.rows = in.write<int64_t>(rows, "rows", {batch, kRowColumns});
  params.candidates = in.read<int64_t>(candidates, "candidates", {batch, length});
  set_numbers(&params, width, start, block_length, max_steps, mode, eos, max_post);
  set_odds(&params, temperature, scale, stop_logit);
  if (params.mode == ActionMode::kSelect && action.scalar_type() == ScalarType::Bool) {
    params.decision = in.read<uint8_t>(action, "action", {batch, length});
  } else {
    params.score = in.read<float>(action, "action", {batch, length});
  }
  params.seed = in.read_seed(seed, params.mode != ActionMode::kSelect && params.mode != ActionMode::kGreedy);
  check(!revise || editable, "TypeError: editable: expected a bool tensor for revise, got None");
  params.revise = in.read<uint8_t>(revise, "revise", {batch, length});
  params.editable = in.read<uint8_t>(editable, "editable", {batch, length});
  params.everywhere = everywhere && revise;
  params.settled_stop = settled_stop;
  const Tensor rank = allocate({batch, length}, ScalarType::Int, tokens);
  params.rank = write<int32_t>(rank);

  if constexpr (kCuda) {
    check_cuda(cuda::unmask(params, current_stream(tokens)), "unmask_");
  } else {
    torch::stable::parallel_for(0, batch, grain_size(32 * length),
                                [&params](int64_t begin, int64_t end) { cpu::unmask(params, begin, end); });
  }
  return rank;
}

}  // namespace
}  // namespace unmask

STABLE_TORCH_LIBRARY_IMPL(unmask, CPU, m) { m.impl("unmask_", TORCH_BOX(&unmask::unmask_<false>)); }

#ifdef UNMASK_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(unmask, CUDA, m) { m.impl("unmask_", TORCH_BOX(&unmask::unmask_<true>)); }
#endif
