// unmask::prepare: from tensors to PrepareParams.
#include "ops/prepare.h"

#include <tuple>

#include "checks.h"

namespace unmask {
namespace {

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <bool kCuda>
Outputs prepare(const Tensor& rows, const Tensor& mask, const Tensor& allowed, const OptionalTensor& editable,
                const OptionalTensor& seed, int64_t start, int64_t canvas_width, int64_t block_length, int64_t horizon,
                bool everywhere) {
  [[maybe_unused]] const auto scope = device_scope<kCuda>(mask);
  check_value(mask.dim() == 2 && mask.size(1) >= 1, "mask", mask.sizes(), "shape (B, L) with L >= 1");
  check_value(block_length >= 1, "block_length", block_length, "at least 1");
  check_value(horizon >= 1, "horizon", horizon, "at least 1");
  const int64_t batch = mask.size(0), length = mask.size(1);
  Arguments in(mask);
  PrepareParams params{};
  params.batch = batch;
  params.length = length;
  params.start = start;
  params.canvas_width = canvas_width;
  params.block_length = block_length;
  params.horizon = static_cast<float>(horizon);
  params.everywhere = everywhere;
  params.rows = in.read<int64_t>(rows, "rows", {batch, kRowColumns});
  params.mask = in.read<uint8_t>(mask, "mask", {batch, length});
  params.allowed = in.read<uint8_t>(allowed, "allowed", {batch, length});
  params.editable = in.read<uint8_t>(editable, "editable", {batch, length});
  params.seed = in.read_seed(seed, seed.has_value());

  // (B, n), or empty.
  const auto make = [&](bool wanted, int64_t n, ScalarType dtype) {
    return allocate({wanted ? batch : 0, n}, dtype, mask);
  };
  const bool blocks = block_length < length;
  const Tensor steps = allocate({batch}, ScalarType::Long, mask), time = allocate({batch}, ScalarType::Float, mask);
  const Tensor positions = make(blocks, block_length, ScalarType::Long);
  const Tensor places = make(blocks, block_length, ScalarType::Long);
  const Tensor sources = make(blocks, length, ScalarType::Long);
  const Tensor revisable = make(params.editable, length, ScalarType::Bool);
  const Tensor read = make(params.editable, length, ScalarType::Bool);
  const Tensor uniform = make(params.seed, length, ScalarType::Float);
  params.steps = write<int64_t>(steps);
  params.time = write<float>(time);
  params.positions = blocks ? write<int64_t>(positions) : nullptr;
  params.places = blocks ? write<int64_t>(places) : nullptr;
  params.sources = blocks ? write<int64_t>(sources) : nullptr;
  params.revisable = write<uint8_t>(revisable);
  params.read = write<uint8_t>(read);
  params.uniform = write<float>(uniform);
  if constexpr (kCuda) {
    check_cuda(cuda::prepare(params, current_stream(mask)), "prepare");
  } else {
    torch::stable::parallel_for(0, batch, grain_size(4 * length),
                                [&params](int64_t begin, int64_t end) { cpu::prepare(params, begin, end); });
  }
  return {steps, time, positions, places, sources, revisable, read, uniform};
}

}  // namespace
}  // namespace unmask

STABLE_TORCH_LIBRARY_IMPL(unmask, CPU, m) { m.impl("prepare", TORCH_BOX(&unmask::prepare<false>)); }

#ifdef UNMASK_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(unmask, CUDA, m) { m.impl("prepare", TORCH_BOX(&unmask::prepare<true>)); }
#endif
