// unmask::choose: from tensors to ChooseParams.
#include "ops/choose.h"

#include <algorithm>
#include <tuple>

#include "checks.h"

namespace unmask {
namespace {

template <bool kCuda>
std::tuple<Tensor, Tensor, Tensor> choose(const Tensor& region, const OptionalTensor& allowed,
                                          const Tensor& probability, const Tensor& candidates,
                                          const OptionalTensor& values, const OptionalTensor& picked,
                                          const OptionalTensor& tokens, const OptionalTensor& editable,
                                          const OptionalTensor& steps, const OptionalTensor& phase,
                                          const OptionalTensor& memory, int64_t rule, int64_t score,
                                          const std::vector<double>& numbers, int64_t block_length, int64_t horizon,
                                          const std::vector<int64_t>& stops, int64_t window, double decay,
                                          int64_t spacing, bool hold_eos, double edit) {
  [[maybe_unused]] const auto scope = device_scope<kCuda>(region);
  check_value(region.dim() == 2, "region", region.sizes(), "shape (B, L)");
  check_value(rule >= 0 && rule < static_cast<int64_t>(ChooseRule::kRules), "rule", rule, "0 to 7");
  check_value(score >= 0 && score < static_cast<int64_t>(ChooseScore::kScores), "score", score, "0 to 5");
  check_value(numbers.size() == kMaxChooseNumbers, "numbers", numbers.size(), "3 of them");
  check_value(stops.size() <= kMaxChooseStops, "stops", stops.size(), "at most 16 ids");
  check_value(block_length >= 1, "block_length", block_length, "at least 1");
  check_value(horizon >= 1, "horizon", horizon, "at least 1");
  check_value(window >= 1, "window", window, "at least 1");
  check_value(spacing >= 1, "spacing", spacing, "at least 1");
  const int64_t batch = region.size(0), length = region.size(1);
  Arguments in(region);
  ChooseParams params{};
  params.rule = static_cast<ChooseRule>(rule);
  params.kind = static_cast<ChooseScore>(score);
  const bool counts = params.rule == ChooseRule::kFixedSteps || params.rule == ChooseRule::kBlockSteps;
  const bool reads = params.kind != ChooseScore::kProbability && params.kind != ChooseScore::kPlace;
  check_value(!counts || numbers[0] >= 1.0, "numbers", numbers[0], "at least 1 step");
  check(!counts || (steps && memory), "TypeError: memory and steps: expected int64 tensors for a schedule, got None");
  check(!reads || values, "TypeError: values: expected a float32 tensor for this score, got None");
  check(picked || params.rule != ChooseRule::kPicked, "TypeError: picked: expected a bool tensor, got None");
  check(!editable || tokens, "TypeError: tokens: expected an int64 tensor for editable, got None");
  params.batch = batch;
  params.length = length;
  params.block_length = block_length;
  params.horizon = horizon;
  params.window = window;
  params.spacing = spacing;
  params.decay = static_cast<float>(decay);
  params.edit = static_cast<float>(edit);
  params.hold_eos = hold_eos;
  params.num_stops = static_cast<int>(stops.size());
  std::copy(stops.begin(), stops.end(), params.stops);
  std::copy(numbers.begin(), numbers.end(), params.numbers);
  params.region = in.read<uint8_t>(region, "region", {batch, length});
  params.allowed = in.read<uint8_t>(allowed, "allowed", {batch, length});
  params.probability = in.read<float>(probability, "probability", {batch, length});
  params.candidates = in.read<int64_t>(candidates, "candidates", {batch, length});
  params.num_values = 1;
  if (reads && params.kind == ChooseScore::kMargin) {
    check_value(values->dim() == 3 && values->size(2) >= 2, "values", values->sizes(), "shape (B, L, K) with K >= 2");
    params.num_values = values->size(2);
    params.values = in.read<float>(values, "values", {batch, length, params.num_values});
  } else if (reads) {
    params.values = in.read<float>(values, "values", {batch, length});
  }
  params.picked = in.read<uint8_t>(picked, "picked", {batch, length});
  if (editable) {
    const bool rows = tokens->dim() == 2 && tokens->stride(1) == 1;  // of a canvas that is longer than the buffer
    if (rows) in.check_tensor<int64_t>(*tokens, "tokens", {batch, length});
    params.tokens = rows ? static_cast<const int64_t*>(tokens->const_data_ptr())
                         : in.read<int64_t>(tokens, "tokens", {batch, length});
    params.token_stride = rows ? tokens->stride(0) : length;
    params.editable = in.read<uint8_t>(editable, "editable", {batch, length});
  }
  params.phase = in.read<int64_t>(phase, "phase", {batch});
  if (counts) {
    params.steps = in.read<int64_t>(steps, "steps", {batch});
    params.memory = in.write<int64_t>(*memory, "memory", {batch, 2});
  }
  const Tensor select = allocate({batch, length}, ScalarType::Bool, region);
  const Tensor order = allocate({batch, length}, ScalarType::Float, region);
  const Tensor revise = allocate({editable ? batch : 0, length}, ScalarType::Bool, region);
  params.select = write<uint8_t>(select);
  params.score = write<float>(order);
  params.revise = write<uint8_t>(revise);
  if (batch == 0 || length == 0) return {select, order, revise};

  if constexpr (kCuda) {
    check_cuda(cuda::choose(params, current_stream(region)), "choose");
  } else {
    torch::stable::parallel_for(0, batch, grain_size(16 * length),
                                [&params](int64_t begin, int64_t end) { cpu::choose(params, begin, end); });
  }
  return {select, order, revise};
}

}  // namespace
}  // namespace unmask

STABLE_TORCH_LIBRARY_IMPL(unmask, CPU, m) { m.impl("choose", TORCH_BOX(&unmask::choose<false>)); }

#ifdef UNMASK_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(unmask, CUDA, m) { m.impl("choose", TORCH_BOX(&unmask::choose<true>)); }
#endif
