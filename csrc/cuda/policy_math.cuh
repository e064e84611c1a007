// Small matrix products and reductions of policy_forward, for one block of kPolicyThreads threads.
#pragma once
#include "policy_layout.cuh"

namespace unmask {
namespace cuda {

UNMASK_DEVICE float4 load4(const float* p) { return *reinterpret_cast<const float4*>(p); }

UNMASK_DEVICE float dot4(const float4& a, const float4& b, float sum) {
  sum = fmaf(a.x, b.x, sum);
  sum = fmaf(a.y, b.y, sum);
  sum = fmaf(a.z, b.z, sum);
  return fmaf(a.w, b.w, sum);
}

// Sums eight values over the warp with nine shuffles. Lane l gets the sum of value l / 4.
UNMASK_DEVICE float warp_sum_eight(float (&v)[8]) {
  const unsigned lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 4; half > 0; half /= 2) {
    const unsigned bit = static_cast<unsigned>(half) * 4;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const bool upper = (lane & bit) != 0;
      const float send = upper ? v[i] : v[i + half], keep = upper ? v[i + half] : v[i];
      v[i] = keep + __shfl_xor_sync(kFullWarp, send, bit);
    }
  }
  v[0] += __shfl_xor_sync(kFullWarp, v[0], 2);
  v[0] += __shfl_xor_sync(kFullWarp, v[0], 1);
  return v[0];
}

// For rows [begin, end) of a matrix in global memory, row(r) -> its d columns, and `count` vectors x + v * d in shared
// memory: emit(r, v, dot product, sub) in four lanes, sub = 0..3. d a multiple of 4, at most 256. A warp takes four
// rows and two vectors at a time; where that leaves warps idle, several of them share the vectors of four rows.
template <typename RowOf, typename Emit>
UNMASK_DEVICE void dots(int begin, int end, int d, const float* x, int count, RowOf row, Emit emit) {
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  const int fours = (end - begin + 3) / 4, pairs = (count + 1) / 2;
  const int spare = kPolicyWarps / (fours > 0 ? fours : 1), split = spare < 1 ? 1 : spare < pairs ? spare : pairs;
#pragma unroll 1
  for (int task = warp; task < fours * split; task += kPolicyWarps) {
    const int first = begin + 4 * (task / split);
    float4 w[4][2];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int column = 4 * lane + 128 * j;
        w[r][j] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (first + r < end && column < d) w[r][j] = __ldg(reinterpret_cast<const float4*>(row(first + r) + column));
      }
    }
#pragma unroll 1
    for (int v = 2 * (task % split); v < count; v += 2 * split) {
      float sums[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) sums[i] = 0.0f;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int column = 4 * lane + 128 * j;
        if (column < d) {
#pragma unroll
          for (int second = 0; second < 2; ++second) {
            const float4 values = load4(x + (v + second < count ? v + second : v) * d + column);
#pragma unroll
            for (int r = 0; r < 4; ++r) sums[2 * r + second] = dot4(w[r][j], values, sums[2 * r + second]);
          }
        }
      }
      const float sum = warp_sum_eight(sums);
      const int r = first + lane / 8, vector = v + lane / 4 % 2;
      if (r < end && vector < count) emit(r, vector, sum, lane % 4);
    }
  }
}

// emit(m, n, sum_k a[m, k] b[n, k]) for m < rows, n < columns, by the whole block; k a multiple of 4. A warp's tile is
// 8 rows, whose elements all its lanes share, by 64 columns, two per lane; if there are fewer tiles than warps, the sum
// over k is split as well and put together through `scratch`. `a` in shared memory, `b` there or in global memory.
// The results are visible to the block only after its next barrier.
template <typename Emit>
UNMASK_DEVICE void product(const float* a, int lda, int rows, const float* b, int ldb, int columns, int k,
                           float* scratch, int scratch_floats, Emit emit) {
  constexpr int kRows = 8;
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  const int across = (columns + 63) / 64, tiles = (rows + kRows - 1) / kRows * across;
  int split = 1;
  while (2 * split * tiles <= kPolicyWarps && 2 * split * rows * columns <= scratch_floats && k >= 32 * split) split *= 2;
#pragma unroll 1
  for (int task = warp; task < tiles * split; task += kPolicyWarps) {
    const int part = task % split, tile = task / split;
    const int m = tile / across * kRows, n = tile % across * 64 + lane;
    const int from = k / 4 * part / split * 4, to = k / 4 * (part + 1) / split * 4;
    // Beyond the last row or column the last one is computed again, and dropped.
    const float* low = b + static_cast<int64_t>(n < columns ? n : columns - 1) * ldb;
    const float* high = b + static_cast<int64_t>(n + 32 < columns ? n + 32 : columns - 1) * ldb;
    float sums[kRows][2];
#pragma unroll
    for (int i = 0; i < kRows; ++i) sums[i][0] = sums[i][1] = 0.0f;
#pragma unroll 1
    for (int j = from; j < to; j += 4) {
      const float4 w0 = load4(low + j), w1 = load4(high + j);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const float4 x = load4(a + (m + i < rows ? m + i : rows - 1) * lda + j);
        sums[i][0] = dot4(x, w0, sums[i][0]);
        sums[i][1] = dot4(x, w1, sums[i][1]);
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int column = n + 32 * half;
        if (m + i >= rows || column >= columns) continue;
        if (split == 1) {
          emit(m + i, column, sums[i][half]);
        } else {
          scratch[(part * rows + m + i) * columns + column] = sums[i][half];
        }
      }
    }
  }
  if (split == 1) return;
  __syncthreads();
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < rows * columns; i += kPolicyThreads) {
    float sum = 0.0f;
    for (int part = 0; part < split; ++part) sum += scratch[part * rows * columns + i];
    emit(i / columns, i % columns, sum);
  }
}

// Layer norm of one row spread over a warp: entry e of lane l is channel l + 32 e, of `d` channels. Afterwards x holds
// (x - mean) / sqrt(variance + eps), and the factor is returned.
constexpr int kPerLane = 8;
UNMASK_DEVICE float normalise(float (&x)[kPerLane], int d) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  float sum = 0.0f;
#pragma unroll
  for (int e = 0; e < kPerLane; ++e) sum += lane + 32 * e < d ? x[e] : 0.0f;
  const float mean = warp_sum(sum) / static_cast<float>(d);
  sum = 0.0f;
#pragma unroll
  for (int e = 0; e < kPerLane; ++e) {
    x[e] -= mean;
    sum += lane + 32 * e < d ? x[e] * x[e] : 0.0f;
  }
  const float factor = 1.0f / sqrtf(warp_sum(sum) / static_cast<float>(d) + 1e-5f);
#pragma unroll
  for (int e = 0; e < kPerLane; ++e) x[e] *= factor;
  return factor;
}

struct Angle {
  float cos, sin;
};
// Exact for positions of any size: the turns are counted off in double.
UNMASK_DEVICE Angle angle_of(double radians) {
  const double turns = radians * 0.15915494309189535;
  const float rest = static_cast<float>(turns - rint(turns));
  Angle a;
  sincospif(2.0f * rest, &a.sin, &a.cos);
  return a;
}

UNMASK_DEVICE float gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f)); }

}  // namespace cuda
}  // namespace unmask
