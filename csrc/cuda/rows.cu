// choose, prepare and unmask_ on CUDA: one block per row. The rows are short, so a launch costs more than the work in it.
#include "../ops/choose_row.h"
#include "../ops/prepare.h"
#include "portable.cuh"

namespace unmask::cuda {
namespace {

// The threads of a block. Dynamic shared memory: one result per warp, and what `rest` points to.
struct RowBlock {
  static constexpr int64_t threads = 256;
  static constexpr int kWarps = threads / 32, kRest = kWarps * sizeof(int64_t);
  int64_t thread = threadIdx.x;
  unsigned char* rest = dynamic_shared() + kRest;
  double* times = reinterpret_cast<double*>(rest);

  UNMASK_DEVICE void barrier() const { __syncthreads(); }
  UNMASK_DEVICE bool all(bool x) const { return __syncthreads_and(x); }

  // Leaves in shared memory what combine() makes of the warps' x.
  template <typename T, typename Combine>
  UNMASK_DEVICE const T* of_warps(T x, const Combine& combine) const {
    x = warp_all(x, combine);
    T* found = reinterpret_cast<T*>(dynamic_shared());
    __syncthreads();  // earlier readers are done
    if (thread % 32 == 0) found[thread / 32] = x;
    __syncthreads();
    return found;
  }
  template <typename T, typename Combine>
  UNMASK_DEVICE T reduce(T x, const Combine& combine) const {
    const T* found = of_warps(x, combine);
    x = found[0];
    for (int w = 1; w < kWarps; ++w) x = combine(x, found[w]);
    return x;
  }
  template <typename T>
  UNMASK_DEVICE T min(T x) const {
    return reduce(x, [](T a, T b) { return b < a ? b : a; });
  }
  UNMASK_DEVICE int64_t sum(int64_t x) const {
    return reduce(x, [](int64_t a, int64_t b) { return a + b; });
  }
  UNMASK_DEVICE int64_t before(int64_t x) const {
    const int64_t* found = of_warps(x, [](int64_t a, int64_t b) { return a + b; });
    int64_t sum = x;
    for (int offset = 1; offset < 32; offset *= 2) {
      const int64_t other = __shfl_up_sync(kFullWarp, sum, offset);
      if (thread % 32 >= offset) sum += other;
    }
    for (int w = 0; w < thread / 32; ++w) sum += found[w];
    return sum - x;
  }
  template <typename Taken, typename Earlier, typename Give>
  UNMASK_DEVICE void rank(int64_t n, const Taken& taken, const Earlier& earlier, const Give& give) const {
    for (int64_t i = thread; i < n; i += threads) {
      if (!taken(i)) continue;
      int32_t rank = 0;
      for (int64_t j = 0; j < n; ++j) rank += earlier(j, i) ? 1 : 0;
      give(i, rank);
    }
  }
};

UNMASK_DEVICE void do_row(const ChooseParams& params, const RowBlock& block) {
  choose_row(params, blockIdx.x, block, ChooseScratch(block.rest, params.length));
}
UNMASK_DEVICE void do_row(const PrepareParams& params, const RowBlock& block) {
  prepare_row(params, blockIdx.x, block);
}
UNMASK_DEVICE void do_row(const UnmaskParams& params, const RowBlock& block) { unmask_row(params, blockIdx.x, block); }

template <typename Params>
__global__ void __launch_bounds__(RowBlock::threads) row_kernel(const __grid_constant__ Params params) {
  launch_dependents();
  wait_for_launches();
  do_row(params, RowBlock());
}

// A block per row, with `bytes` of shared memory for `rest`.
template <typename Params>
int launch_rows(const Params& params, int64_t bytes, void* stream) {
  return launch_blocks(row_kernel<Params>, params.batch, RowBlock::threads, RowBlock::kRest + bytes, stream, params);
}

}  // namespace

int choose(const ChooseParams& params, void* stream) {
  return launch_rows(params, params.length * ChooseScratch::kBytes, stream);
}

int prepare(const PrepareParams& params, void* stream) { return launch_rows(params, 0, stream); }

int unmask(const UnmaskParams& params, void* stream) {
  const int64_t block = params.block_length < params.length ? params.block_length : params.length;
  // For a block of some 28,000 positions on Hopper: more than any generation buffer.
  return launch_rows(params, params.mode == ActionMode::kDpls ? block * static_cast<int64_t>(sizeof(double)) : 0,
                     stream);
}

}  // namespace unmask::cuda
