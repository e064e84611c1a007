// unmask::calm_: from tensors to CalmParams.
#include "ops/calm.h"

#include <tuple>

#include "torch/logits.h"

namespace unmask {
namespace {

template <bool kCuda>
std::tuple<Tensor, Tensor> calm(const Tensor& logits, const Tensor& previous, const Tensor& calm_for,
                                const Tensor& steps, const OptionalTensor& positions, int64_t excluded, double bound,
                                int64_t needed) {
  [[maybe_unused]] const auto scope = device_scope<kCuda>(logits);
  CalmParams params{};
  params.dtype = kernel_dtype(logits);
  check_value(logits.dim() == 3 && logits.size(1) >= 1 && logits.size(2) >= 1, "logits", logits.sizes(),
              "shape (B, S, V) with S and V >= 1");
  check_value(calm_for.dim() == 2, "calm_for", calm_for.sizes(), "shape (B, L)");
  const int64_t batch = logits.size(0), places = logits.size(1), length = calm_for.size(1);
  check_value(positions || places == length, "logits", logits.sizes(), "all L positions, or positions");
  check_value(needed >= 0, "needed", needed, "at least 0");
  Arguments in(logits);
  params.previous = in.write(previous, logits.scalar_type(), "previous", logits.sizes());
  params.calm_for = in.write<int32_t>(calm_for, "calm_for", {batch, length});
  params.positions = in.read<int64_t>(positions, "positions", {batch, places});
  params.steps = in.read<int64_t>(steps, "steps", {batch});
  params.places = places;
  params.vocab = logits.size(2);
  params.length = length;
  params.excluded = excluded;
  params.bound = static_cast<float>(bound);
  params.needed = needed;
  const bool rows = params.vocab == 1 || logits.stride(2) == 1;
  const Tensor kept = rows ? logits : torch::stable::contiguous(logits);
  params.logits = kept.const_data_ptr();
  params.stride_row = kept.stride(0);
  params.stride_place = kept.stride(1);
  const Tensor calm = allocate({batch, length}, ScalarType::Bool, logits);
  const Tensor divergence = allocate({batch, places}, ScalarType::Float, logits);
  params.calm = write<uint8_t>(calm);
  params.divergence = write<float>(divergence);
  if constexpr (kCuda) {
    check_cuda(cuda::calm(params, batch * places, current_stream(logits)), "calm_");
  } else {
    torch::stable::parallel_for(0, batch * places, grain_size(4 * params.vocab),
                                [&params](int64_t begin, int64_t end) { cpu::calm(params, begin, end); });
  }
  return {calm, divergence};
}

}  // namespace
}  // namespace unmask

STABLE_TORCH_LIBRARY_IMPL(unmask, CPU, m) { m.impl("calm_", TORCH_BOX(&unmask::calm<false>)); }

#ifdef UNMASK_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(unmask, CUDA, m) { m.impl("calm_", TORCH_BOX(&unmask::calm<true>)); }
#endif
