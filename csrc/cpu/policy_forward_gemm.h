// Matrix products and elementwise functions of policy_forward. No include guard: compiled once per instruction set.
//
// Activations of many rows are stored (channel, row), so that the lanes of a vector are rows: products broadcast
// weights straight from torch's (out, in) layout, and whatever runs over channels (layer norm, softmax over keys) needs
// no sums across lanes. A handful of vectors (conditioning, bases) is stored row by row instead, and multiplied by
// `dots`, which reads every weight once.
namespace unmask::cpu::UNMASK_ISA {

// Terms summed in registers before they join the result: short chains round less, which attention scores in the hundreds
// need; the feed-forward's long sums do not.
UNMASK_INLINE int64_t chain_length(int64_t terms) { return terms > 256 ? 128 : 32; }

// A matrix M whose rows are `stride` apart, and what is added to its products with vectors; null: nothing.
struct Matrix {
  const float* weight;
  int64_t stride;
  const float* bias = nullptr;
};

// y[r, lane] = bias[r] + sum_k A[r, k] x[k, lane] for R outputs from `first` on and V vectors of lanes; A is M or its
// transpose.
template <bool kTransposed, int R, int V>
UNMASK_INLINE void product_tile(int64_t first, int64_t in, Matrix m, const float* x, int64_t xs, float* y, int64_t ys) {
  const int64_t chain = chain_length(in), row = kTransposed ? 1 : m.stride, column = kTransposed ? m.stride : 1;
  const float* w = m.weight + first * row;
  y += first * ys;
  for (int64_t done = 0; done == 0 || done < in; done += chain) {
    vf sum[R][V];
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < V; ++v) sum[r][v] = splat(done == 0 && m.bias ? m.bias[first + r] : 0.0f);
    }
    const int64_t end = in - done < chain ? in - done : chain;
    for (int64_t k = 0; k < end; ++k, x += xs, w += column) {
      vf inputs[V];
      for (int v = 0; v < V; ++v) inputs[v] = load(x + v * kLanes);
      for (int r = 0; r < R; ++r) {
        const vf weight = splat(w[r * row]);
        for (int v = 0; v < V; ++v) sum[r][v] = mul_add(weight, inputs[v], sum[r][v]);
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < V; ++v) {
        float* out = y + r * ys + v * kLanes;
        store(out, done == 0 ? sum[r][v] : load(out) + sum[r][v]);
      }
    }
  }
}

template <bool kTransposed, int R, int V>
static void product_lanes(int64_t out, int64_t in, Matrix m, const float* x, int64_t xs, float* y, int64_t ys) {
  for (int64_t o = 0; o < out && out >= R; o += R) {
    if (o + R > out) o = out - R;  // the last ones once more, together with their predecessors
    product_tile<kTransposed, R, V>(o, in, m, x, xs, y, ys);
  }
  for (int64_t o = 0; o < out && out < R; ++o) product_tile<kTransposed, 1, V>(o, in, m, x, xs, y, ys);
}

// y (out, lanes) = A x (in, lanes) + bias; lanes a multiple of kLanes.
template <bool kTransposed = false>
static void product(int64_t out, int64_t in, int64_t lanes, Matrix m, const float* x, int64_t xs, float* y,
                    int64_t ys) {
  int64_t i = 0;
  for (; i + 2 * kLanes <= lanes; i += 2 * kLanes) product_lanes<kTransposed, 6, 2>(out, in, m, x + i, xs, y + i, ys);
  if (i < lanes) product_lanes<kTransposed, 8, 1>(out, in, m, x + i, xs, y + i, ys);
}

// Sums of the lanes of each of `count` vectors (a multiple of 4).
template <int count>
UNMASK_INLINE void sum_lanes(const vf* v, float* sums) {
#if UNMASK_LANES == 4
  for (int i = 0; i < count; ++i) sums[i] = (v[i][0] + v[i][1]) + (v[i][2] + v[i][3]);
#else
  for (int i = 0; i < count; i += 4) {
    __m256 half[4];
    for (int j = 0; j < 4; ++j) {
#if UNMASK_LANES == 16
      const __m512 whole = (__m512)v[i + j];
      half[j] = _mm256_add_ps(_mm512_castps512_ps256(whole), _mm512_extractf32x8_ps(whole, 1));
#else
      half[j] = (__m256)v[i + j];
#endif
    }
    const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]), _mm256_hadd_ps(half[2], half[3]));
    _mm_storeu_ps(sums + i, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
  }
#endif
}

// y (count, out) = x (count, in) W^T + bias, with the weights of torch's layer W (out, in); out >= 16.
static void dots(int64_t count, int64_t out, int64_t in, const PolicyLinear& layer, const float* x, float* y) {
  constexpr int kOutputs = 8;
  for (int64_t o = 0; o < out; o += kOutputs) {
    if (o + kOutputs > out) o = out - kOutputs;
    const float* w = layer.weight + o * in;
    for (int64_t n = 0; n < count; ++n) {
      const float* vector = x + n * in;
      vf sum[kOutputs] = {};
      int64_t k = 0;
      for (; k + kLanes <= in; k += kLanes) {
        for (int r = 0; r < kOutputs; ++r) sum[r] = mul_add(load(w + r * in + k), load(vector + k), sum[r]);
      }
      float sums[kOutputs];
      sum_lanes<kOutputs>(sum, sums);
      for (int r = 0; r < kOutputs; ++r) {
        float total = sums[r] + layer.bias[o + r];
        for (int64_t i = k; i < in; ++i) total += w[r * in + i] * vector[i];
        y[n * out + o + r] = total;
      }
    }
  }
}

// x * Phi(x), the exact GELU, to 3e-7: max(x, 0) - |x| Phi(-|x|) with log2 Phi(-a) a polynomial on [0, 6.5].
UNMASK_INLINE vf gelu(vf x) {
  const vf positive = maximum(splat(0.0f), x);
  const vf size = maximum(x, -x);
  const vf a = minimum(size, splat(6.5f));
  const vf p = polynomial(a, 3.30927869072184e-05f, -0.0007692194194532931f, 0.00808071531355381f,
                          -0.05341210216283798f, -0.4587709605693817f, -1.1512017250061035f, -0.999993085861206f);
  return mul_add(-size, exp2_fast(p), positive);
}

// x * sigmoid(x).
UNMASK_INLINE vf silu(vf x) {
  const vf e = exp2_fast(minimum(x, -x) * kLog2E);  // e^-|x|
  const vf s = 1.0f / (1.0f + e);
  return x * (x >= 0.0f ? s : e * s);
}

UNMASK_INLINE vf inverse_deviation(vf variance) {
  vf r;
  for (int i = 0; i < kLanes; ++i) r[i] = 1.0f / __builtin_sqrtf(variance[i] + 1e-5f);
  return r;
}

// Mean and 1 / sqrt(variance + 1e-5) over d channels of each lane of one vector; x[c * xs] is channel c.
UNMASK_INLINE void layer_statistics(const float* x, int64_t d, int64_t xs, vf* mean, vf* inverse) {
  vf sum[4] = {}, square[4] = {};
  for (int64_t c = 0; c < d; c += 4) {  // d is a multiple of 16
    for (int j = 0; j < 4; ++j) sum[j] += load(x + (c + j) * xs);
  }
  const vf m = ((sum[0] + sum[1]) + (sum[2] + sum[3])) / static_cast<float>(d);
  for (int64_t c = 0; c < d; c += 4) {
    for (int j = 0; j < 4; ++j) {
      const vf centred = load(x + (c + j) * xs) - m;
      square[j] = mul_add(centred, centred, square[j]);
    }
  }
  *mean = m;
  *inverse = inverse_deviation(((square[0] + square[1]) + (square[2] + square[3])) / static_cast<float>(d));
}

}  // namespace unmask::cpu::UNMASK_ISA
