// unmask_ on CUDA: one block per row. The rows are short, so a launch costs more than the work in it.
#include "../ops/unmask_row.h"
#include "portable.cuh"

namespace unmask::cuda {
namespace {

constexpr int kUnmaskThreads = 256;
constexpr int kUnmaskWarps = kUnmaskThreads / 32;

// The threads of this block. Dynamic shared memory: one result per warp, and for kDpls the times.
struct Block {
  static constexpr int64_t threads = kUnmaskThreads;
  static constexpr int kTimesOffset = kUnmaskWarps * sizeof(double);
  int64_t thread = threadIdx.x;
  double* times = reinterpret_cast<double*>(dynamic_shared() + kTimesOffset);

  UNMASK_DEVICE void barrier() const { __syncthreads(); }
  UNMASK_DEVICE bool all(bool x) const { return __syncthreads_and(x); }

  template <typename T, typename Combine>
  UNMASK_DEVICE T reduce(T x, const Combine& combine) const {
    for (int offset = 16; offset > 0; offset >>= 1) x = combine(x, __shfl_xor_sync(kFullWarp, x, offset));
    T* of_warps = reinterpret_cast<T*>(dynamic_shared());
    __syncthreads();  // earlier readers are done
    if (thread % 32 == 0) of_warps[thread / 32] = x;
    __syncthreads();
    x = of_warps[0];
    for (int w = 1; w < kUnmaskWarps; ++w) x = combine(x, of_warps[w]);
    return x;
  }
  template <typename T>
  UNMASK_DEVICE T min(T x) const {
    return reduce(x, [](T a, T b) { return b < a ? b : a; });
  }
  UNMASK_DEVICE int64_t sum(int64_t x) const {
    return reduce(x, [](int64_t a, int64_t b) { return a + b; });
  }
  UNMASK_DEVICE void rank_arrivals(const UnmaskRow& row, const double* at, int64_t winner, double stop) const {
    for (int64_t i = row.begin + thread; i < row.end; i += threads) {
      if (!(at[i] < stop) && i != winner) continue;
      // The rank is the number of earlier arrivals; all of them come before `stop` too, or are the winner.
      int32_t earlier = 0;
      for (int64_t j = row.begin; j < row.end; ++j) earlier += at[j] < at[i] || (at[j] == at[i] && j < i) ? 1 : 0;
      row.rank[i] = earlier;
    }
  }
};

__global__ void __launch_bounds__(kUnmaskThreads) unmask_kernel(const __grid_constant__ UnmaskParams params) {
  launch_dependents();
  wait_for_launches();
  unmask_row(params, blockIdx.x, Block());
}

}  // namespace

int unmask(const UnmaskParams& params, void* stream) {
  if (params.batch == 0) return cudaSuccess;
  DeviceInfo device;
  const cudaError_t error = query_device(&device);
  if (error != cudaSuccess) return error;
  const int64_t block = params.block_length < params.length ? params.block_length : params.length;
  const int64_t times = params.mode == ActionMode::kDpls ? block * static_cast<int64_t>(sizeof(double)) : 0;
  // A block of some 28,000 positions on Hopper: more than any generation buffer.
  if (Block::kTimesOffset + times > device.shared_bytes || params.batch > INT32_MAX) return cudaErrorInvalidValue;
  const LaunchShape shape{static_cast<unsigned>(params.batch), kUnmaskThreads,
                          static_cast<int>(Block::kTimesOffset + times), stream, 1, device.clusters};
  return launch(unmask_kernel, shape, params);
}

}  // namespace unmask::cuda
