// What the kernels of policy_forward compute with: products of 16 rows with a matrix on the tensor cores, as exact as
// float32; copies of matrices to shared memory; layer norm, angles and GELU.
#pragma once
#include <math.h>

#include "portable.cuh"

namespace unmask {
namespace cuda {

constexpr int kTileRows = 16;  // rows of a product
constexpr int kPerLane = 8;    // channels of a row that a lane of a warp holds: at most 256 in all

UNMASK_DEVICE int lane_id() { return static_cast<int>(threadIdx.x % 32); }
UNMASK_DEVICE int warp_id() { return static_cast<int>(threadIdx.x / 32); }
UNMASK_DEVICE int warp_count() { return static_cast<int>(blockDim.x / 32); }

UNMASK_DEVICE float4 load4(const float* p) { return *reinterpret_cast<const float4*>(p); }
UNMASK_DEVICE void store2(float* p, float x, float y) { *reinterpret_cast<float2*>(p) = make_float2(x, y); }

// Floats from one row to the next in shared memory, for rows of n floats, n a multiple of 16: an odd multiple of 16, so
// that eight lanes that read 16 bytes each of two neighbouring rows meet in no bank.
__host__ __device__ constexpr int row_stride(int n) { return n | 16; }

// Starts copying a matrix to shared memory: row(r) is where row r begins, at a multiple of 16 bytes, or null for a row of
// zeros. `columns` is a multiple of 4. The copies belong to the next group that is committed.
template <typename RowOf>
UNMASK_DEVICE void stage(float* to, int stride, int rows, int columns, RowOf row) {
  const int fours = columns / 4;
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < rows * fours; i += static_cast<int>(blockDim.x)) {
    const int r = i / fours, column = i % fours * 4;
    const float* from = row(r);
    if (from) {
      copy_async(to + r * stride + column, from + column);
    } else {
      *reinterpret_cast<float4*>(to + r * stride + column) = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
  }
}

// Four numbers, each as the sum of two that a tensor core reads exactly, or nearly: it ignores the low 13 bits.
struct Split {
  uint32_t high[4], low[4];
  UNMASK_DEVICE explicit Split(const float4& x) {
    const float values[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(high[i]) : "f"(values[i]));
      low[i] = __float_as_uint(values[i] - __uint_as_float(high[i]));
    }
  }
};

// sum (16 x 8) += a (16 x 8) b (8 x 8): elements i and i + 1 of each lane's four.
UNMASK_DEVICE void mma(float (&sum)[4], const uint32_t (&top)[4], const uint32_t (&bottom)[4], const uint32_t (&b)[4],
                       int i) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(top[i]), "r"(bottom[i]), "r"(top[i + 1]), "r"(bottom[i + 1]), "r"(b[i]), "r"(b[i + 1]));
}

// By a warp: sum[t] += a (16 rows) times rows 8 t to 8 t + 7 of b, over k columns, a multiple of 16. Lane l gets rows l / 4
// (elements 0 and 1) and l / 4 + 8 (2 and 3), columns l % 4 * 2 and the next. Products of the high parts are summed in
// registers 16 at a time: a tensor core cuts its sums, where an addition rounds.
template <int kTiles>
UNMASK_DEVICE void multiply(const float* a, int lda, const float* b, int ldb, int k, float (&sum)[kTiles][4]) {
  const int row = lane_id() / 4, column = lane_id() % 4 * 4;
  const float *above = a + row * lda + column, *below = above + 8 * lda, *other = b + row * ldb + column;
  float small[kTiles][4] = {};
#pragma unroll 4
  for (int j = 0; j < k; j += 16) {
    const Split top(load4(above + j)), bottom(load4(below + j));
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const Split w(load4(other + 8 * t * ldb + j));
      float big[4] = {};
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        mma(small[t], top.low, bottom.low, w.high, i);
        mma(small[t], top.high, bottom.high, w.low, i);
        mma(big, top.high, bottom.high, w.high, i);
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[t][e] += big[e];
    }
  }
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int e = 0; e < 4; ++e) sum[t][e] += small[t][e];
  }
}

// By the block: emit(r, c, sum, next) with elements (r, c) and (r, c + 1) of a (16, k) times b (columns, k) transposed;
// `columns` is a multiple of 8 kTiles, `a` in shared memory. A warp takes 8 kTiles columns at a time.
template <int kTiles, typename Emit>
UNMASK_DEVICE void product(const float* a, int lda, const float* b, int ldb, int columns, int k, Emit emit) {
  const int row = lane_id() / 4, column = lane_id() % 4 * 2;
#pragma unroll 1
  for (int n = warp_id() * 8 * kTiles; n < columns; n += warp_count() * 8 * kTiles) {
    float sum[kTiles][4] = {};
    multiply(a, lda, b + n * ldb, ldb, k, sum);
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      emit(row, n + 8 * t + column, sum[t][0], sum[t][1]);
      emit(row + 8, n + 8 * t + column, sum[t][2], sum[t][3]);
    }
  }
}

// By a warp that holds a row of d channels: f(e, channel), entry e of lane l being channel l + 32 e.
template <typename F>
UNMASK_DEVICE void for_channels(int d, F f) {
#pragma unroll
  for (int e = 0; e < kPerLane; ++e) {
    if (lane_id() + 32 * e < d) f(e, lane_id() + 32 * e);
  }
}

// Layer norm of such a row without its weights: x becomes (x - mean) / sqrt(variance + eps).
UNMASK_DEVICE void normalise(float (&x)[kPerLane], int d) {
  float sum = 0.0f;
  for_channels(d, [&](int e, int) { sum += x[e]; });
  const float mean = warp_sum(sum) / static_cast<float>(d);
  sum = 0.0f;
  for_channels(d, [&](int e, int) {
    x[e] -= mean;
    sum = fmaf(x[e], x[e], sum);
  });
  const float factor = 1.0f / sqrtf(warp_sum(sum) / static_cast<float>(d) + 1e-5f);
  for_channels(d, [&](int e, int) { x[e] *= factor; });
}

struct Angle {
  float cos, sin;
};
// Exact for angles of any size: the turns are counted off in double.
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
