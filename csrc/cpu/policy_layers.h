// Layers that the policy networks share, on a chunk of at most kRows rows (positions) in hand, whose channels are kRows
// apart; policy_forward_gemm.h comes before it. No include guard.
namespace unmask::cpu::UNMASK_ISA {

constexpr int64_t kRows = 2 * kLanes;  // rows worked on together, and the row stride of their buffers

UNMASK_INLINE int64_t round_to_lanes(int64_t n) { return round_up(n, kLanes); }

// Columns `rows` of `from` (channels, positions); lanes beyond `count` hold any numbers of finite rows.
static void gather(int64_t channels, const float* from, int64_t stride, const int32_t* rows, int64_t count,
                   int64_t lanes, float* to) {
  if (rows[count - 1] - rows[0] == count - 1) {  // neighbours, as rows ascend; from's rows are padded
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t v = 0; v < lanes; v += kLanes) store(to + c * kRows + v, load(from + c * stride + rows[0] + v));
    }
    return;
  }
  for (int64_t i = 0; i < lanes; ++i) {
    const float* column = from + rows[i < count ? i : count - 1];
    for (int64_t c = 0; c < channels; ++c) to[c * kRows + i] = column[c * stride];
  }
}

// The way back, for `count` rows.
static void scatter(int64_t channels, const float* from, const int32_t* rows, int64_t count, float* to,
                    int64_t stride) {
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t i = 0; i < count; ++i) to[c * stride + rows[i]] = from[c * kRows + i];
  }
}

// y (D, kRows) = the layer norm of s.x.
static void normed(const ChunkScratch& s, const PolicyLinear& norm, int64_t lanes, float* y) {
  for (int64_t v = 0; v < lanes; v += kLanes) {
    vf mean, inverse;
    layer_statistics(s.x + v, s.d, kRows, &mean, &inverse);
    for (int64_t c = 0; c < s.d; ++c) {
      const vf centred = (load(s.x + c * kRows + v) - mean) * inverse;
      store(y + c * kRows + v, mul_add(centred, splat(norm.weight[c]), splat(norm.bias[c])));
    }
  }
}

// Rotary embedding of x (2 pairs, lanes) in place, channels 2i and 2i + 1; tables (half, lanes), repeated for each head.
static void rotate(int64_t pairs, int64_t half, float* x, int64_t xs, const float* cosine, const float* sine,
                   int64_t ts, int64_t lanes) {
  for (int64_t i = 0; i < pairs; ++i) {
    float *even = x + 2 * i * xs, *odd = even + xs;
    const float *c = cosine + i % half * ts, *s = sine + i % half * ts;
    for (int64_t j = 0; j < lanes; j += kLanes) {
      const vf a = load(even + j), b = load(odd + j);
      store(even + j, a * load(c + j) - b * load(s + j));
      store(odd + j, a * load(s + j) + b * load(c + j));
    }
  }
}

// The same for x (2 pairs, kRows) at positions `rows`.
static void rotate_rows(const ChunkScratch& s, const SinusoidTable& table, int64_t pairs, const int32_t* rows,
                        int64_t count, int64_t lanes, float* x) {
  gather(s.head / 2, table.cosine, table.stride, rows, count, lanes, s.cosine);
  gather(s.head / 2, table.sine, table.stride, rows, count, lanes, s.sine);
  rotate(pairs, s.head / 2, x, kRows, s.cosine, s.sine, kRows, lanes);
}

// 2^(scale (score - row's maximum)) in place for one vector of rows; returns 1 / their sum.
UNMASK_INLINE vf exponentials(float* scores, int64_t length, float scale) {
  vf best = load(scores);
  for (int64_t j = 1; j < length; ++j) best = maximum(best, load(scores + j * kRows));
  vf sum[2] = {};
  for (int64_t j = 0; j < length; ++j) {
    const vf e = exp2_fast((load(scores + j * kRows) - best) * scale);
    store(scores + j * kRows, e);
    sum[j & 1] += e;
  }
  return 1.0f / (sum[0] + sum[1]);
}

// What a head attends to: rows of keys (D, L), and of values (size, L), `step` rows from one head's to the next's.
struct Attention {
  const float *key, *value;
  int64_t stride, size, step;
};

// Attention of the rows whose queries are in s.query: per head the weighted mean of its values, (heads * size, kRows).
static void attend(const ChunkScratch& s, const Attention& to, int64_t lanes, float* out) {
  const float scale = kLog2E / __builtin_sqrtf(static_cast<float>(s.head));
  for (int64_t h = 0; h < s.heads; ++h, out += to.size * kRows) {
    product<true>(s.length, s.head, lanes, {to.key + h * s.head * to.stride, to.stride}, s.query + h * s.head * kRows,
                  kRows, s.scores, kRows);
    vf inverse[2];
    for (int64_t v = 0; v < lanes; v += kLanes) inverse[v / kLanes] = exponentials(s.scores + v, s.length, scale);
    product(to.size, s.length, lanes, {to.value + h * to.step * to.stride, to.stride}, s.scores, kRows, out, kRows);
    for (int64_t a = 0; a < to.size; ++a) {
      for (int64_t v = 0; v < lanes; v += kLanes) {
        store(out + a * kRows + v, load(out + a * kRows + v) * inverse[v / kLanes]);
      }
    }
  }
}

// s.x += gate * s.update; without a gate, 1.
static void add_update(const ChunkScratch& s, const float* gate, int64_t lanes) {
  for (int64_t c = 0; c < s.d; ++c) {
    for (int64_t v = 0; v < lanes; v += kLanes) {
      float* x = s.x + c * kRows + v;
      store(x, mul_add(load(s.update + c * kRows + v), splat(gate ? gate[c] : 1.0f), load(x)));
    }
  }
}

// s.x += gate * down(gelu(up(h))), h (inputs, kRows).
static void feed_forward(const ChunkScratch& s, const Matrix& up, int64_t inputs, const PolicyLinear& down,
                         const float* gate, int64_t lanes, const float* h) {
  product(s.f, inputs, lanes, up, h, kRows, s.ffn, kRows);
  for (int64_t c = 0; c < s.f; ++c) {
    for (int64_t v = 0; v < lanes; v += kLanes) store(s.ffn + c * kRows + v, gelu(load(s.ffn + c * kRows + v)));
  }
  product(s.d, s.f, lanes, {down.weight, s.f, down.bias}, s.ffn, kRows, s.update, kRows);
  add_update(s, gate, lanes);
}

// to[row] = the output of the layer norm of s.x, for each of `rows`.
static void output(const ChunkScratch& s, const PolicyLinear& norm, const PolicyLinear& layer, const int32_t* rows,
                   int64_t count, int64_t lanes, float* to) {
  for (int64_t v = 0; v < lanes; v += kLanes) {
    vf mean, inverse, sum = {}, constant = {};
    layer_statistics(s.x + v, s.d, kRows, &mean, &inverse);
    for (int64_t c = 0; c < s.d; ++c) {
      sum = mul_add(load(s.x + c * kRows + v) - mean, splat(norm.weight[c] * layer.weight[c]), sum);
      constant = mul_add(splat(norm.bias[c]), splat(layer.weight[c]), constant);
    }
    const vf logit = mul_add(sum, inverse, constant + layer.bias[0]);
    for (int64_t i = 0; i < kLanes && v + i < count; ++i) to[rows[v + i]] = logit[i];
  }
}

}  // namespace unmask::cpu::UNMASK_ISA
