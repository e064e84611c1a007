// A baseline: softmax statistics with one thread block for each row, as sampling kernels of serving engines are laid
// out. The block goes over its row twice: for the largest logit and its id, then for the sum of exp(x - largest).
// With few rows most of the device idles, which is what a kernel that splits rows is compared against.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

struct Best {
  float value;
  int64_t id;
};

// The larger value; the lower id among equals.
__device__ inline Best better(Best a, Best b) {
  return b.value > a.value || (b.value == a.value && b.id < a.id) ? b : a;
}

__device__ inline Best warp_best(Best best) {
  for (int offset = 16; offset > 0; offset /= 2) {
    const Best other{__shfl_xor_sync(0xffffffffu, best.value, offset), __shfl_xor_sync(0xffffffffu, best.id, offset)};
    best = better(best, other);
  }
  return best;
}

__device__ inline float warp_sum(float sum) {
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  return sum;
}

// Calls use(index, logit) for the thread's share of a row, 16 bytes at a time where the row is aligned for that.
template <typename Element, typename Use>
__device__ inline void for_each(const Element* row, int64_t vocab, Use use) {
  constexpr int kWidth = 16 / sizeof(Element);
  const bool aligned = reinterpret_cast<uintptr_t>(row) % 16 == 0;
  const int64_t vectors = aligned ? vocab / kWidth : 0;
  for (int64_t i = threadIdx.x; i < vectors; i += kThreads) {
    const int4 word = reinterpret_cast<const int4*>(row)[i];
    Element element[kWidth];
    memcpy(element, &word, sizeof(word));
#pragma unroll
    for (int w = 0; w < kWidth; ++w) use(i * kWidth + w, to_float(element[w]));
  }
  for (int64_t i = vectors * kWidth + threadIdx.x; i < vocab; i += kThreads) use(i, to_float(row[i]));
}

template <typename Element>
__global__ void __launch_bounds__(kThreads)
    row_statistics(const Element* __restrict__ logits, int64_t vocab, float* __restrict__ confidence,
                   int64_t* __restrict__ token) {
  __shared__ Best shared_best[kWarps];
  __shared__ float shared_sum[kWarps];
  const Element* row = logits + blockIdx.x * vocab;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  Best best{-INFINITY, INT64_MAX};
  for_each(row, vocab, [&](int64_t id, float x) { best = better(best, Best{x, id}); });
  best = warp_best(best);
  if (lane == 0) shared_best[warp] = best;
  __syncthreads();
  best = warp_best(shared_best[lane % kWarps]);  // every warp finds the same

  float sum = 0.0f;
  for_each(row, vocab, [&](int64_t, float x) { sum += expf(x - best.value); });
  sum = warp_sum(sum);
  if (lane == 0) shared_sum[warp] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0.0f;
    for (int w = 0; w < kWarps; ++w) total += shared_sum[w];
    confidence[blockIdx.x] = 1.0f / total;
    token[blockIdx.x] = best.id;
  }
}

template <typename Element>
void launch(const void* logits, int64_t rows, int64_t vocab, float* confidence, int64_t* token, cudaStream_t stream) {
  row_statistics<<<static_cast<unsigned>(rows), kThreads, 0, stream>>>(static_cast<const Element*>(logits), vocab,
                                                                       confidence, token);
}

}  // namespace

// Largest probability (rows,) float32 and its id (rows,) int64 of contiguous logits (rows, vocab) of finite numbers;
// dtype: 0 float32, 1 bfloat16, 2 float16. Returns a cudaError_t.
extern "C" int one_block_per_row(const void* logits, int dtype, int64_t rows, int64_t vocab, float* confidence,
                                 int64_t* token, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  if (rows < 1 || vocab < 1) return cudaErrorInvalidValue;
  switch (dtype) {
    case 0:
      launch<float>(logits, rows, vocab, confidence, token, on);
      break;
    case 1:
      launch<__nv_bfloat16>(logits, rows, vocab, confidence, token, on);
      break;
    case 2:
      launch<__half>(logits, rows, vocab, confidence, token, on);
      break;
    default:
      return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}
