// calm_ on CUDA: a block for each place. Rows of both sets of logits begin at any alignment, so a thread reads an element at
// a time, a warp 32 neighbours; enough of them are under way to keep the memory busy.
#include "../ops/calm.h"

#include "topk_row.cuh"

namespace unmask::cuda {
namespace {

constexpr int kAtOnce = 8;  // elements of each row that a thread has under way

struct CalmBlock {
  static constexpr int64_t threads = 1024;  // few places must keep the memory busy, too
  int64_t thread = threadIdx.x;
};

// Of some elements x and y of two rows: sums of e^x, e^y and e^x (x - y), relative to e^top of each. A sum begins at -inf.
struct Moved {
  float top_x = -FLT_MAX, top_y = -FLT_MAX, sum_x = 0.0f, sum_y = 0.0f, weighted = 0.0f;

  UNMASK_DEVICE static float power(float x) { return exp2_fast(x * kLog2e); }
  UNMASK_DEVICE void raise(float x, float y) {
    const float factor = power(top_x - x);
    weighted = factor > 0.0f ? weighted * factor : 0.0f;  // it may be infinite
    sum_x *= factor;
    sum_y *= power(top_y - y);
    top_x = x;
    top_y = y;
  }
  UNMASK_DEVICE void add(float x, float y) {
    const float e = power(x - top_x);
    sum_x += e;
    sum_y += power(y - top_y);
    if (e > 0.0f) weighted = fmaf(e, x - y, weighted);
  }
  // Over the lanes of a warp.
  UNMASK_DEVICE void reduce() {
    raise(warp_max(top_x), warp_max(top_y));
    sum_x = warp_sum(sum_x);
    sum_y = warp_sum(sum_y);
    weighted = warp_sum(weighted);
  }
};

template <typename Format>
UNMASK_DEVICE float divergence_and_copy(const CalmParams& p, int64_t place) {
  using Element = typename Format::Element;
  const Element* now = static_cast<const Element*>(p.logits) + p.offset(place);
  Element* previous = static_cast<Element*>(p.previous) + place * p.vocab;
  Moved moved;
  for (int64_t first = threadIdx.x; first < p.vocab; first += kAtOnce * CalmBlock::threads) {
    Element kept[kAtOnce], before[kAtOnce];
    float x[kAtOnce], y[kAtOnce];
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      const int64_t id = first + n * CalmBlock::threads;
      kept[n] = id < p.vocab ? now[id] : Element(Format::kMinusInfinity);
      before[n] = id < p.vocab ? previous[id] : Element(Format::kMinusInfinity);
    }
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      const int64_t id = first + n * CalmBlock::threads;
      if (id < p.vocab) previous[id] = kept[n];
      x[n] = id == p.excluded ? -INFINITY : Format::value(kept[n]);
      y[n] = id == p.excluded ? -INFINITY : Format::value(before[n]);
    }
    const float most_x = vector_max(x), most_y = vector_max(y);
    if (most_x > moved.top_x || most_y > moved.top_y)
      moved.raise(fmaxf(moved.top_x, most_x), fmaxf(moved.top_y, most_y));
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) moved.add(x[n], y[n]);
  }
  moved.reduce();
  __shared__ Moved of_warps[32];
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = moved;
  __syncthreads();
  moved = of_warps[threadIdx.x % 32];
  moved.reduce();
  const float divergence = moved.weighted / moved.sum_x - (moved.top_x - moved.top_y) - logf(moved.sum_x / moved.sum_y);
  return divergence < 0.0f ? 0.0f : divergence;
}

template <typename Format>
__global__ void __launch_bounds__(CalmBlock::threads) calm_kernel(const __grid_constant__ CalmParams p) {
  launch_dependents();
  wait_for_launches();
  calm_place(p, blockIdx.x, CalmBlock(), [&] { return divergence_and_copy<Format>(p, blockIdx.x); });
}

}  // namespace

int calm(const CalmParams& params, int64_t places, void* stream) {
  const auto kernel = params.dtype == DType::kFloat32    ? calm_kernel<Float32>
                      : params.dtype == DType::kBFloat16 ? calm_kernel<BFloat16>
                                                         : calm_kernel<Float16>;
  return launch_blocks(kernel, places, CalmBlock::threads, 0, stream, params);
}

}  // namespace unmask::cuda
