// policy_forward for one instruction set; policy_layers.h comes before it. No include guard.
namespace unmask::cpu::UNMASK_ISA {

// One sequence in hand.
struct PolicySequence {
  const PolicyForwardParams& p;
  const PolicyWeightView& w;
  const PolicyScratch& s;
  SinusoidTable rotary;
  const uint8_t* mask;      // (L)
  const float* confidence;  // (L, K)
  const float* ada;         // (2, 6D): scale1, shift1, gate1, scale2, shift2, gate2 for mask 0 and 1, see condition()

  const float* modulation(int m, int part) const { return ada + (6 * m + part) * p.sizes.hidden; }
};

static float mean_of(const float* x, int64_t count, int64_t step) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += static_cast<double>(x[i * step]);
  return static_cast<float>(sum / static_cast<double>(count));
}

// ada(cond) for both mask values of each of `count` sequences, into s.ada (2 * count, 6D), as what it makes of the norms:
// scale = weight (1 + gamma), shift = bias (1 + gamma) + beta and gate = 1 + alpha.
static void condition(const PolicyForwardParams& p, const PolicyWeightView& w, const PolicyScratch& s,
                      const int64_t* sequences, int64_t count) {
  const int64_t d = p.sizes.hidden;
  for (int64_t n = 0; n < count; ++n) {
    const double time = static_cast<double>(p.time[sequences[n]]);
    float* cosine = s.embedding + n * d;
    float* sine = cosine + d / 2;
    for (int64_t i = 0; i < d / 2; ++i) {
      const bool repeated = i > 0 && w.frequencies[i] == w.frequencies[i - 1];
      const double angle = time * static_cast<double>(w.frequencies[i]);
      cosine[i] = repeated ? cosine[i - 1] : static_cast<float>(cos(angle));
      sine[i] = repeated ? sine[i - 1] : static_cast<float>(sin(angle));
    }
  }
  dots(count, d, d, w.time_in, s.embedding, s.shared_in);
  for (int64_t i = 0; i < count * d; i += kLanes) store(s.shared_in + i, silu(load(s.shared_in + i)));
  dots(count, d, d, w.time_out, s.shared_in, s.shared);
  for (int64_t n = 0; n < count; ++n) {
    for (int64_t c = 0; c < d; ++c) {
      const float shared = s.shared[n * d + c] + (p.cond ? p.cond[sequences[n] * d + c] : 0.0f);
      s.cond[2 * n * d + c] = shared + w.mask_embedding[c];
      s.cond[(2 * n + 1) * d + c] = shared + w.mask_embedding[d + c];
    }
  }
  dots(2 * count, 6 * d, d, w.ada, s.cond, s.ada);
  for (int64_t half = 0; half < 4 * count; ++half) {
    const PolicyLinear& norm = half % 2 ? w.norm2 : w.norm1;
    float *scale = s.ada + half * 3 * d, *shift = scale + d, *gate = shift + d;
    for (int64_t c = 0; c < d; ++c) {
      shift[c] += norm.bias[c] * (1.0f + scale[c]);
      scale[c] = norm.weight[c] * (1.0f + scale[c]);
      gate[c] += 1.0f;
    }
  }
}

// Confidences of `lanes` rows, transposed to (K, kRows); lanes beyond `count` repeat the last row. rows null: from `first`.
static void gather_confidence(const PolicySequence& q, const int32_t* rows, int64_t first, int64_t count,
                              int64_t lanes) {
  const int64_t k = q.p.sizes.confidences;
  for (int64_t i = 0; i < lanes; ++i) {
    const int64_t j = i < count ? i : count - 1;
    const float* row = q.confidence + (rows ? rows[j] : first + j) * k;
    for (int64_t a = 0; a < k; ++a) q.s.confidence[a * kRows + i] = row[a];
  }
}

// One vector of positions: the attention's input as coefficients on the basis of each position's mask value.
UNMASK_INLINE void input_coefficients(const PolicySequence& q, vi masked, const float* confidence, vf inverse,
                                      float* out) {
  const int64_t span = q.s.span, stride = q.s.stride;
  const vf zero = {};
  for (int64_t a = 0; a < span; ++a) {
    vf c = inverse;
    if (a < span - 2) c = load(confidence + a * kRows) * inverse;
    if (a == span - 1) c = splat(1.0f);
    store(out + a * stride, masked ? zero : c);
    store(out + (span + a) * stride, masked ? c : zero);
  }
}

// One vector of positions: the attention's input itself.
UNMASK_INLINE void input_channels(const PolicySequence& q, vi masked, const float* x, vf mean, vf inverse, float* out) {
  const int64_t d = q.p.sizes.hidden, stride = q.s.stride;
  const float *scale0 = q.modulation(0, 0), *scale1 = q.modulation(1, 0);
  const float *shift0 = q.modulation(0, 1), *shift1 = q.modulation(1, 1);
  for (int64_t c = 0; c < d; ++c) {
    const vf scale = masked ? splat(scale1[c]) : splat(scale0[c]);
    const vf shift = masked ? splat(shift1[c]) : splat(shift0[c]);
    store(out + c * stride, mul_add((load(x + c * kRows) - mean) * inverse, scale, shift));
  }
}

// s.input (inputs, L): what the attention reads at every position.
static void attention_input(const PolicySequence& q) {
  const int64_t d = q.p.sizes.hidden, k = q.p.sizes.confidences, length = q.p.length;
  for (int64_t first = 0; first < length; first += kRows) {
    const int64_t count = length - first < kRows ? length - first : kRows, lanes = round_to_lanes(count);
    gather_confidence(q, nullptr, first, count, lanes);
    product(d, k, lanes, {q.w.confidence.weight, k, q.w.confidence.bias}, q.s.confidence, kRows, q.s.x, kRows);
    for (int64_t v = 0; v < lanes; v += kLanes) {
      vi masked = {};
      for (int64_t i = 0; i < kLanes && v + i < count; ++i) masked[i] = q.mask[first + v + i] ? -1 : 0;
      vf mean, inverse;
      layer_statistics(q.s.x + v, d, kRows, &mean, &inverse);
      float* out = q.s.input + first + v;
      if (q.s.low_rank) {
        input_coefficients(q, masked, q.s.confidence + v, inverse, out);
      } else {
        input_channels(q, masked, q.s.x + v, mean, inverse, out);
      }
    }
  }
}

// The basis of the attention's input for both mask values, and its projections by q, k, v and v's by out.
static void project_basis(const PolicySequence& q) {
  const PolicyScratch& s = q.s;
  const int64_t d = q.p.sizes.hidden, k = q.p.sizes.confidences, heads = q.p.sizes.heads, size = d / heads;
  const int64_t stride = s.basis_stride, lanes = round_to_lanes(2 * s.span);
  for (int64_t a = 0; a <= k; ++a) {
    const float* column = a < k ? q.w.confidence.weight + a : q.w.confidence.bias;
    const int64_t step = a < k ? k : 1;
    const float mean = mean_of(column, d, step);
    for (int m = 0; m < 2; ++m) {
      const float* scale = q.modulation(m, 0);
      float* out = s.basis + m * s.span + a;
      for (int64_t c = 0; c < d; ++c) out[c * stride] = (column[c * step] - mean) * scale[c];
    }
  }
  for (int m = 0; m < 2; ++m) {
    const float* shift = q.modulation(m, 1);
    for (int64_t c = 0; c < d; ++c) s.basis[c * stride + m * s.span + k + 1] = shift[c];
  }
  product(d, d, lanes, {q.w.query.weight, d}, s.basis, stride, s.basis_q, stride);
  product(d, d, lanes, {q.w.key.weight, d}, s.basis, stride, s.basis_k, stride);
  product(d, d, lanes, {q.w.value.weight, d}, s.basis, stride, s.basis_v, stride);
  for (int64_t h = 0; h < heads; ++h) {
    product(d, size, lanes, {q.w.out.weight + h * size, d}, s.basis_v + h * size * stride, stride,
            s.basis_out + h * d * stride, stride);
  }
  // A row's attention weights sum to 1, so the bias of v passes through.
  dots(1, d, d, q.w.out, q.w.value.bias, s.out_bias);
}

// Keys (D, L), rotated, and where `values` are not the input coefficients themselves, values (D, L).
static void keys_and_values(const PolicySequence& q) {
  const PolicyScratch& s = q.s;
  const int64_t d = q.p.sizes.hidden, lanes = round_to_lanes(q.p.length);
  const Matrix by =
      s.low_rank ? Matrix{s.basis_k, s.basis_stride, q.w.key.bias} : Matrix{q.w.key.weight, d, q.w.key.bias};
  product(d, s.inputs, lanes, by, s.input, s.stride, s.key, s.stride);
  if (!s.low_rank) product(d, d, lanes, {q.w.value.weight, d, q.w.value.bias}, s.input, s.stride, s.value, s.stride);
  rotate(d / 2, s.head / 2, s.key, s.stride, q.rotary.cosine, q.rotary.sine, q.rotary.stride, lanes);
}

// low_rank: x after attention as a combination of s.residual (D, residuals), for rows of mask value m.
static void residual_basis(const PolicySequence& q, int m) {
  const PolicyScratch& s = q.s;
  const int64_t d = q.p.sizes.hidden, k = q.p.sizes.confidences;
  const float* gate = q.modulation(m, 2);
  for (int64_t c = 0; c < d; ++c) {
    float* row = s.residual + c * s.residual_stride;
    for (int64_t a = 0; a < k; ++a) *row++ = q.w.confidence.weight[c * k + a];
    *row++ = q.w.confidence.bias[c] + gate[c] * s.out_bias[c];
    for (int64_t h = 0; h < q.p.sizes.heads; ++h) {
      const float* out = s.basis_out + (h * d + c) * s.basis_stride;
      for (int64_t a = 0; a < s.values; ++a) *row++ = gate[c] * out[a];
    }
  }
}

// The feed-forward's first layer on that basis, normed, and on the shift as a further column: s.up_low (F, residuals + 1).
static void project_residual(const PolicySequence& q, int m) {
  const PolicyScratch& s = q.s;
  const int64_t d = q.p.sizes.hidden, f = q.p.sizes.ffn, stride = s.residual_stride;
  const int64_t lanes = round_to_lanes(s.residuals + 1);
  const float *scale = q.modulation(m, 3), *shift = q.modulation(m, 4);
  for (int64_t v = 0; v < lanes; v += kLanes) {
    vf sum[2] = {};
    for (int64_t c = 0; c < d; ++c) sum[c & 1] += load(s.residual + c * stride + v);
    const vf mean = (sum[0] + sum[1]) / static_cast<float>(d);
    for (int64_t c = 0; c < d; ++c) {
      store(s.up_input + c * stride + v, (load(s.residual + c * stride + v) - mean) * scale[c]);
    }
  }
  for (int64_t c = 0; c < d; ++c) s.up_input[c * stride + s.residuals] = shift[c];
  product(f, d, lanes, {q.w.up.weight, d}, s.up_input, stride, s.up_low, stride);
  for (int64_t c = 0; c < f; ++c) s.up_low[c * stride + s.residuals] += q.w.up.bias[c];
}

// Queries (D, kRows) of some rows of mask value m, rotated.
static void queries(const PolicySequence& q, int m, const int32_t* rows, int64_t count, int64_t lanes) {
  const PolicyScratch& s = q.s;
  const int64_t inputs = s.low_rank ? s.span : s.d;
  gather(inputs, s.low_rank ? s.input + m * s.span * s.stride : s.input, s.stride, rows, count, lanes, s.query_input);
  const Matrix by = s.low_rank ? Matrix{s.basis_q + m * s.span, s.basis_stride, q.w.query.bias}
                               : Matrix{q.w.query.weight, s.d, q.w.query.bias};
  product(s.d, inputs, lanes, by, s.query_input, kRows, s.query, kRows);
  rotate_rows(s, q.rotary, s.d / 2, rows, count, lanes, s.query);
}

// s.x (D, kRows): the residual stream after attention; with low_rank its coefficients are left in s.mixed.
static void attention_block(const PolicySequence& q, int m, const int32_t* rows, int64_t count, int64_t lanes) {
  const PolicyScratch& s = q.s;
  const int64_t d = q.p.sizes.hidden, k = q.p.sizes.confidences;
  queries(q, m, rows, count, lanes);
  gather_confidence(q, rows, 0, count, lanes);
  const Attention keys{s.key, s.low_rank ? s.input : s.value, s.stride, s.values, s.low_rank ? 0 : s.head};
  if (s.low_rank) {
    for (int64_t v = 0; v < lanes; v += kLanes) {
      for (int64_t a = 0; a < k; ++a) store(s.mixed + a * kRows + v, load(s.confidence + a * kRows + v));
      store(s.mixed + k * kRows + v, splat(1.0f));
    }
    attend(s, keys, lanes, s.mixed + (k + 1) * kRows);
    product(d, s.residuals, lanes, {s.residual, s.residual_stride}, s.mixed, kRows, s.x, kRows);
    return;
  }
  attend(s, keys, lanes, s.mixed);
  product(d, k, lanes, {q.w.confidence.weight, k, q.w.confidence.bias}, s.confidence, kRows, s.x, kRows);
  product(d, d, lanes, {q.w.out.weight, d, q.w.out.bias}, s.mixed, kRows, s.update, kRows);
  add_update(s, q.modulation(m, 2), lanes);
}

// Adds the feed-forward to s.x; `low` = its first layer works on the coefficients in s.mixed.
static void feed_forward(const PolicySequence& q, int m, bool low, int64_t lanes) {
  const PolicyScratch& s = q.s;
  if (!low) {
    normed(s, {q.modulation(m, 3), q.modulation(m, 4)}, lanes, s.h);
    feed_forward(s, {q.w.up.weight, s.d, q.w.up.bias}, s.d, q.w.down, q.modulation(m, 5), lanes, s.h);
    return;
  }
  for (int64_t v = 0; v < lanes; v += kLanes) {
    vf mean, inverse;
    layer_statistics(s.x + v, s.d, kRows, &mean, &inverse);
    for (int64_t a = 0; a < s.residuals; ++a) store(s.h + a * kRows + v, load(s.mixed + a * kRows + v) * inverse);
    store(s.h + s.residuals * kRows + v, splat(1.0f));
  }
  const Matrix up{s.up_low, s.residual_stride};
  feed_forward(s, up, s.residuals + 1, q.w.down, q.modulation(m, 5), lanes, s.h);
}

// Logits of one sequence whose ada is ready; at least one row is selected.
static void policy_sequence(const PolicySequence& q, const uint8_t* select, float* logits) {
  const PolicyScratch& s = q.s;
  const int64_t d = q.p.sizes.hidden;
  attention_input(q);
  if (s.low_rank) project_basis(q);
  keys_and_values(q);
  for (int m = 0; m < 2; ++m) {
    int64_t count = 0;
    for (int64_t i = 0; i < q.p.length; ++i) {
      if ((!select || select[i]) && (q.mask[i] != 0) == (m == 1)) s.rows[count++] = static_cast<int32_t>(i);
    }
    if (count == 0) continue;
    // Worth it once what the rows save pays for projecting the basis.
    const int64_t columns = s.residuals + 1, rows = round_to_lanes(count);
    const bool low = s.low_rank && round_to_lanes(columns) * d + rows * columns < rows * d;
    if (s.low_rank) residual_basis(q, m);
    if (low) project_residual(q, m);
    for (int64_t first = 0; first < count; first += kRows) {
      const int64_t some = count - first < kRows ? count - first : kRows, lanes = round_to_lanes(some);
      attention_block(q, m, s.rows + first, some, lanes);
      feed_forward(q, m, low, lanes);
      output(s, q.w.final_norm, q.w.output, s.rows + first, some, lanes, logits);
    }
  }
}

void policy_forward(const PolicyForwardParams& p, int64_t begin, int64_t end, const PolicyScratch& s,
                    const SinusoidTable& rotary) {
  const PolicyWeightView w(p.weights, p.sizes);
  const int64_t length = p.length;
  int64_t sequence = begin;
  while (sequence < end) {
    int64_t group[kMaxGroup], count = 0;
    for (; sequence < end && count < kMaxGroup; ++sequence) {
      bool wanted = !p.select;
      for (int64_t i = 0; i < length; ++i) {
        wanted = wanted || p.select[sequence * length + i];
        p.logits[sequence * length + i] = -__builtin_inff();
      }
      if (wanted) group[count++] = sequence;
    }
    if (count) condition(p, w, s, group, count);
    for (int64_t n = 0; n < count; ++n) {
      const int64_t row = group[n] * length;
      const PolicySequence one{
          p, w, s, rotary, p.mask + row, p.confidence + row * p.sizes.confidences, s.ada + 2 * n * 6 * p.sizes.hidden};
      policy_sequence(one, p.select ? p.select + row : nullptr, p.logits + row);
    }
  }
}

}  // namespace unmask::cpu::UNMASK_ISA
