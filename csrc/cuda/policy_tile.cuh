// What policy_forward and select_set compute with: products of 16 rows with a matrix on the tensor cores, as exact as
// float32; copies of matrices to shared memory; layer norm, angles and GELU.
#pragma once
#include <math.h>

#include <algorithm>

#include "../ops/policy_forward.h"
#include "portable.cuh"

namespace unmask::cuda {

constexpr int kRows = 16;                // of a tile
constexpr int kRowThreads = 32 * kRows;  // a warp for each row of a tile
constexpr int kPerLane = 8;              // channels of a row that a lane of a warp holds: at most 256 in all

UNMASK_DEVICE int thread_id() { return static_cast<int>(threadIdx.x); }
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
  for (int i = thread_id(); i < rows * fours; i += kRowThreads) {
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
  for (int n = warp_id() * 8; n < columns; n += kRows * 8) {
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

// By a warp that holds a row: the output of its layer norm.
UNMASK_DEVICE float output_of(float (&x)[kPerLane], int d, const PolicyLinear& norm, const PolicyLinear& layer) {
  float sum = 0.0f;
  normalise(x, d);
  for_channels(d, [&](int e, int c) { sum = fmaf(fmaf(x[e], norm.weight[c], norm.bias[c]), layer.weight[c], sum); });
  return warp_sum(sum) + layer.bias[0];
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

// Launches blocks that are on the device together and meet.
template <typename Work>
cudaError_t launch_together(void (*kernel)(Work), LaunchShape shape, Work work) {
  shape.cooperative = true;
  work.launch = launch_number();
  return launch(kernel, shape, work);
}

// Weights are read 16 bytes at a time, and positions are numbered by int.
template <typename Params>
cudaError_t check_network(const Params& params) {
  if (reinterpret_cast<uintptr_t>(params.weights) % 16 != 0) return cudaErrorMisalignedAddress;
  return params.length > INT32_MAX / 1024 ? cudaErrorInvalidValue : cudaSuccess;
}

// Hands out a workspace, from multiples of 128 bytes on; without one it only counts.
struct Pieces {
  void* workspace;
  int64_t bytes = 0;

  float* operator()(int64_t floats) {
    float* at = workspace ? static_cast<float*>(workspace) + bytes / 4 : nullptr;
    bytes += (floats + 31) / 32 * 128;
    return at;
  }
};

// Of a matrix whose rows are at most so long as much is in shared memory as helps; of others what fits on every device.
constexpr int kMostStaged = 128;
constexpr int rows_staged(int columns) { return columns <= kMostStaged ? 64 : 16; }

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Of one sequence: queries (rows, D), scaled to units of log 2, keys (positions, D), values (D, positions).
struct AttentionTile {
  float *query, *key, *value;
};

constexpr int kMaxPairs = 128;  // channel pairs of a head

// Attention of a network over sequences of `length` positions.
struct AttentionShape {
  int length, padded;       // padded: up to full tiles
  int d, heads, head;       // head: channels of one
  int span;                 // channels of a head, with those of neighbours up to multiples of 16, at most
  int keys;                 // that a block takes at a time
  float rotary[kMaxPairs];  // radians per position

  AttentionShape(int64_t positions, int64_t hidden, int64_t num_heads)
      : length(static_cast<int>(positions)),
        padded(ceil_div(length, kRows) * kRows),
        d(static_cast<int>(hidden)),
        heads(static_cast<int>(num_heads)),
        head(d / heads),
        span(head % 16 == 0 ? head : std::min(head / 16 * 16 + 32, d)),
        keys(rows_staged(span)) {
    for (int i = 0; i < head / 2; ++i) {
      rotary[i] = static_cast<float>(pow(10000.0, -2.0 * static_cast<double>(i) / static_cast<double>(head)));
    }
  }

  // Keeps channels c and c + 1 of the query (0), key (1) or value (2) of a position, as row `at`, queries and keys rotated.
  UNMASK_DEVICE void store_projected(const AttentionTile& to, int which, int at, int position, int c, float x,
                                     float y) const {
    if (which == 2) {
      float* value = to.value + static_cast<int64_t>(c) * padded + at;
      value[0] = x;
      value[padded] = y;
      return;
    }
    const float scale = which == 0 ? 1.4426950408889634f / sqrtf(static_cast<float>(head)) : 1.0f;
    const float2 angle = angle_of(static_cast<double>(position) * rotary[c % head / 2]);
    store2((which == 0 ? to.query : to.key) + static_cast<int64_t>(at) * d + c, (x * angle.x - y * angle.y) * scale,
           (x * angle.y + y * angle.x) * scale);
  }
  // Shared memory of attend().
  int floats() const { return (kRows + keys) * row_stride(span) + (kRows + span) * row_stride(keys) + kRows; }
};

// By a warp: a row's scores become exp2(score - maximum so far). `scale` carries maximum and total on; returned is the
// factor of what was summed before.
UNMASK_DEVICE float attention_weights(float* scores, int count, float2* scale) {
  const int lane = lane_id();
  const float first = lane < count ? scores[lane] : -INFINITY;
  const float second = lane + 32 < count ? scores[lane + 32] : -INFINITY;
  const float now = fmaxf(scale->x, warp_max(fmaxf(first, second))), factor = exp2_fast(scale->x - now);
  const float a = exp2_fast(first - now), b = exp2_fast(second - now);
  if (lane < count) scores[lane] = a;
  if (lane + 32 < count) scores[lane + 32] = b;
  *scale = make_float2(now, fmaf(scale->y, factor, warp_sum(a + b)));
  return factor;
}

// By the block: attention of 16 queries, for one head and keys from tile `begin` to `end` of them. `sums`, rows `stride` apart,
// gets the head's values times exp2(score - maximum); done(row, {maximum, sum of these weights}) comes from one lane.
template <typename Done>
UNMASK_DEVICE void attend(const AttentionShape& s, const AttentionTile& tile, int head, int begin, int end,
                          float* shared, float* sums, int stride, Done done) {
  const int low = head * s.head / 16 * 16, span = (head * s.head + s.head + 15) / 16 * 16 - low;
  const auto mine = [&](int c) { return (low + c) / s.head == head; };
  const int span_stride = row_stride(span);
  float *q = shared, *k = q + kRows * span_stride, *v = k + s.keys * span_stride;
  float2 scale = make_float2(-INFINITY, 0.0f);  // of the warp's row
  for (int t = begin; t < end; ++t) {
    const int first = t * s.keys, count = min(s.keys, s.padded - first), key_stride = row_stride(count);
    const float* keys = tile.key + static_cast<int64_t>(first) * s.d + low;
    const float* values = tile.value + static_cast<int64_t>(low) * s.padded + first;
    float *weights = v + span * key_stride, *factors = weights + kRows * key_stride;
    stage(k, count, span, [&](int r) { return keys + r * s.d; });
    stage(v, span, count, [&](int r) { return values + static_cast<int64_t>(r) * s.padded; });
    commit_copies();
    for (int i = thread_id(); i < kRows * span; i += kRowThreads) {
      const int r = i / span, c = i % span;  // zeros keep other heads' channels out
      q[r * span_stride + c] = mine(c) ? tile.query[r * s.d + low + c] : 0.0f;
    }
    wait_copies<0>();
    __syncthreads();
    product(q, span_stride, k, span_stride, count, span, [&](int r, int c, float x, float y) {
      const int left = s.length - first - c;
      store2(weights + r * key_stride + c, left > 0 ? x : -INFINITY, left > 1 ? y : -INFINITY);
    });
    __syncthreads();
    const float factor = attention_weights(weights + warp_id() * key_stride, count, &scale);
    if (lane_id() == 0) factors[warp_id()] = factor;
    if (lane_id() == 0 && t == end - 1) done(warp_id(), scale);
    __syncthreads();
    product(weights, key_stride, v, key_stride, span, count, [&](int r, int c, float x, float y) {
      if (!mine(c)) return;
      float* to = sums + r * stride + low + c;
      if (t > begin) x = fmaf(to[0], factors[r], x), y = fmaf(to[1], factors[r], y);
      store2(to, x, y);
    });
    __syncthreads();
  }
}

}  // namespace unmask::cuda
