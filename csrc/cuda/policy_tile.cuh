// What the kernels of policy_forward compute with: products of 16 rows with a matrix on the tensor cores, as exact as
// float32; copies of matrices to shared memory; layer norm, angles and GELU.
#pragma once
#include <math.h>

#include "portable.cuh"

namespace unmask::cuda {

constexpr int kRows = 16;    // of a tile
constexpr int kPerLane = 8;  // channels of a row that a lane of a warp holds: at most 256 in all

UNMASK_DEVICE int lane_id() { return static_cast<int>(threadIdx.x % 32); }
UNMASK_DEVICE int warp_id() { return static_cast<int>(threadIdx.x / 32); }
UNMASK_DEVICE int block_id() { return static_cast<int>(blockIdx.x); }
UNMASK_DEVICE int block_count() { return static_cast<int>(gridDim.x); }
UNMASK_DEVICE float* shared_floats() { return reinterpret_cast<float*>(dynamic_shared()); }
UNMASK_DEVICE float4 load4(const float* p) { return *reinterpret_cast<const float4*>(p); }
UNMASK_DEVICE void store2(float* p, float x, float y) { *reinterpret_cast<float2*>(p) = make_float2(x, y); }

// Floats from one row to the next in shared memory, for rows of n floats, n a multiple of 16: an odd multiple of 16, so
// that eight lanes that read 16 bytes each of two neighbouring rows meet in no bank.
__host__ __device__ constexpr int row_stride(int n) { return n | 16; }

// By the block: starts to copy a matrix to shared memory, rows row_stride(columns) apart. row(r) is where row r begins,
// at a multiple of 16 bytes. The copies belong to the group that is committed next.
template <typename RowOf>
UNMASK_DEVICE void stage(float* to, int rows, int columns, RowOf row) {
  const int fours = columns / 4;
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < rows * fours; i += static_cast<int>(blockDim.x)) {
    copy_async(to + i / fours * row_stride(columns) + i % fours * 4, row(i / fours) + i % fours * 4);
  }
}

// Four numbers, each as the sum of two of which a tensor core, which ignores the low 13 bits, reads all but 2^-23.
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
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(top[i]), "r"(bottom[i]), "r"(top[i + 1]), "r"(bottom[i + 1]), "r"(b[i]), "r"(b[i + 1]));
}

// By a warp: sum = 16 rows of a times 8 rows of b, over k columns, a multiple of 16. Lane l gets rows l / 4 (elements 0
// and 1) and l / 4 + 8 (2 and 3), columns l % 4 * 2 and the next. Products of the high parts leave the tensor core 16
// at a time: it cuts its sums, where an addition rounds. kAhead loads of b are under way together.
template <int kAhead>
UNMASK_DEVICE void multiply(const float* a, int lda, const float* b, int ldb, int k, float (&sum)[4]) {
  const int row = lane_id() / 4, column = lane_id() % 4 * 4;
  const float *above = a + row * lda + column, *below = above + 8 * lda, *other = b + row * ldb + column;
  float small[4] = {};
  sum[0] = sum[1] = sum[2] = sum[3] = 0.0f;
#pragma unroll kAhead
  for (int j = 0; j < k; j += 16) {
    const Split top(load4(above + j)), bottom(load4(below + j)), w(load4(other + j));
    float big[4] = {};
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      mma(small, top.low, bottom.low, w.high, i);
      mma(small, top.high, bottom.high, w.low, i);
      mma(big, top.high, bottom.high, w.high, i);
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) sum[e] += big[e];
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) sum[e] += small[e];
}

// By the block: emit(r, c, x, y) with elements (r, c) and (r, c + 1) of a (16, k) times b (columns, k) transposed;
// `columns` is a multiple of 8, a warp takes 8 at a time.
template <int kAhead = 2, typename Emit>
UNMASK_DEVICE void product(const float* a, int lda, const float* b, int ldb, int columns, int k, Emit emit) {
#pragma unroll 1
  for (int n = warp_id() * 8; n < columns; n += static_cast<int>(blockDim.x) / 4) {
    float sum[4];
    multiply<kAhead>(a, lda, b + n * ldb, ldb, k, sum);
    emit(lane_id() / 4, n + lane_id() % 4 * 2, sum[0], sum[1]);
    emit(lane_id() / 4 + 8, n + lane_id() % 4 * 2, sum[2], sum[3]);
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
  float sum = 0.0f, squares = 0.0f;
  for_channels(d, [&](int e, int) { sum += x[e]; });
  const float mean = warp_sum(sum) / static_cast<float>(d);
  for_channels(d, [&](int e, int) {
    x[e] -= mean;
    squares = fmaf(x[e], x[e], squares);
  });
  const float factor = 1.0f / sqrtf(warp_sum(squares) / static_cast<float>(d) + 1e-5f);
  for_channels(d, [&](int e, int) { x[e] *= factor; });
}

// Cosine and sine, exact for angles of any size: the turns are counted off in double.
UNMASK_DEVICE float2 angle_of(double radians) {
  const double turns = radians * 0.15915494309189535;
  float2 a;
  sincospif(2.0f * static_cast<float>(turns - rint(turns)), &a.y, &a.x);
  return a;
}

UNMASK_DEVICE float silu(float x) { return x / (1.0f + expf(-x)); }
UNMASK_DEVICE float gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f)); }

}  // namespace unmask::cuda
