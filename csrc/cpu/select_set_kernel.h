// select_set for one instruction set; policy_layers.h comes before it. No include guard.
namespace unmask::cpu::UNMASK_ISA {

// A row of the batch in hand.
struct SetRow {
  const SelectSetParams& p;
  const SetWeightView& w;
  const SetScratch& s;
  SinusoidTable rotary, places;
};

// Calls work(rows, count, lanes) for chunks of `rows`.
template <typename Work>
UNMASK_INLINE void in_chunks(const int32_t* rows, int64_t total, Work work) {
  for (int64_t first = 0; first < total; first += kRows) {
    const int64_t count = total - first < kRows ? total - first : kRows;
    work(rows + first, count, round_to_lanes(count));
  }
}

// s.input (D, L): what the network reads where nothing is picked, of the row whose positions begin at `start`.
static void embed(const SetRow& q, int64_t start) {
  const SetScratch& s = q.s;
  const int64_t k = q.p.sizes.confidences;
  int64_t masked = 0;
  for (int64_t i = 0; i < s.length; ++i) masked += q.p.mask[start + i] != 0;
  const float open = 4.0f * (1.0f - static_cast<float>(masked) / static_cast<float>(s.length));
  for (int64_t c = 0; c < s.d; ++c) s.share[c] = q.w.share_in.weight[c] * open + q.w.share_in.bias[c];
  for (int64_t c = 0; c < s.d; c += kLanes) store(s.share + c, silu(load(s.share + c)));
  dots(1, s.d, s.d, q.w.share_out, s.share, s.added);
  for (int64_t c = 0; c < s.d; ++c) {
    s.added[s.d + c] = s.added[c] + q.w.state[s.d + c];
    s.added[c] += q.w.state[c];
  }
  in_chunks(s.all, s.length, [&](const int32_t* rows, int64_t count, int64_t lanes) {
    for (int64_t i = 0; i < lanes; ++i) {
      const SetPosition position(q.p, start + rows[i < count ? i : count - 1]);
      for (int64_t a = 0; a < k + 2; ++a) s.numbers[a * kRows + i] = position.number(a, k);
    }
    float* places = s.numbers + (k + 2) * kRows;
    gather(kSetPeriods, q.places.cosine, q.places.stride, rows, count, lanes, places);
    gather(kSetPeriods, q.places.sine, q.places.stride, rows, count, lanes, places + kSetPeriods * kRows);
    product(s.d, k + 2 + 2 * kSetPeriods, lanes, {q.w.numbers.weight, s.all_numbers, q.w.numbers.bias}, s.numbers,
            kRows, s.x, kRows);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = start + rows[i];
      const float *token = q.p.table + SetPosition(q.p, at).token * s.d, *added = s.added + (q.p.mask[at] ? s.d : 0);
      for (int64_t c = 0; c < s.d; ++c) s.x[c * kRows + i] += token[c] + added[c];
    }
    scatter(s.d, s.x, rows, count, s.input, s.stride);
  });
}

// Queries, keys and values of a layer at the positions whose inputs are in s.x.
static void project(const SetRow& q, int64_t layer, const int32_t* rows, int64_t count, int64_t lanes) {
  const SetScratch& s = q.s;
  const SetLayer& w = q.w.layers[layer];
  normed(s, w.norm1, lanes, s.h);
  product(3 * s.d, s.d, lanes, {w.qkv.weight, s.d, w.qkv.bias}, s.h, kRows, s.qkv, kRows);
  rotate_rows(s, q.rotary, s.d, rows, count, lanes, s.qkv);  // queries and keys
  scatter(3 * s.d, s.qkv, rows, count, s.projected(layer), s.stride);
}

// s.x of some positions, through a layer whose keys and values are known.
static void apply(const SetRow& q, int64_t layer, const int32_t* rows, int64_t count, int64_t lanes) {
  const SetScratch& s = q.s;
  const SetLayer& w = q.w.layers[layer];
  const float *query = s.projected(layer), *key = query + s.d * s.stride, *value = key + s.d * s.stride;
  gather(s.d, layer ? s.stream : s.input, s.stride, rows, count, lanes, s.x);
  gather(s.d, query, s.stride, rows, count, lanes, s.query);
  attend(s, {key, value, s.stride, s.head, s.head}, lanes, s.mixed);
  product(s.d, s.d, lanes, {w.out.weight, s.d, w.out.bias}, s.mixed, kRows, s.update, kRows);
  add_update(s, nullptr, lanes);
  normed(s, w.norm2, lanes, s.h);
  feed_forward(s, {w.up.weight, s.d, w.up.bias}, s.d, w.down, nullptr, lanes, s.h);
}

// s.p of the free positions: the network, but of the first layer's queries, keys and values only what `fresh` positions
// change, and of the last layer's outputs only what is asked for.
static void run(const SetRow& q, int64_t num_fresh, int64_t num_free) {
  const SetScratch& s = q.s;
  in_chunks(s.fresh, num_fresh, [&](const int32_t* rows, int64_t count, int64_t lanes) {
    gather(s.d, s.input, s.stride, rows, count, lanes, s.x);
    project(q, 0, rows, count, lanes);
  });
  for (int64_t layer = 0; layer + 1 < q.p.layers; ++layer) {
    in_chunks(s.all, s.length, [&](const int32_t* rows, int64_t count, int64_t lanes) {
      apply(q, layer, rows, count, lanes);
      scatter(s.d, s.x, rows, count, s.stream, s.stride);
      project(q, layer + 1, rows, count, lanes);
    });
  }
  in_chunks(s.free, num_free, [&](const int32_t* rows, int64_t count, int64_t lanes) {
    apply(q, q.p.layers - 1, rows, count, lanes);
    output(s, q.w.norm, q.w.output, rows, count, lanes, s.p);
  });
}

struct OneLane {
  static constexpr int64_t lane = 0, lanes = 1;

  bool any(bool x) const { return x; }
  void best(float*, int64_t*) const {}
};

static void select_row(const SetRow& q, int64_t row) {
  const SetScratch& s = q.s;
  const int64_t length = s.length, start = row * length;
  uint8_t* state = q.p.select + start;
  float* score = q.p.score + start;
  bool on = false;
  for (int64_t i = 0; i < length; ++i) {
    state[i] = q.p.allowed[start + i] ? kFree : kBarred;
    score[i] = 0.0f;
    s.all[i] = s.fresh[i] = static_cast<int32_t>(i);
    on = on || state[i] == kFree;
  }
  if (on) embed(q, start);
  SetChoice choice(q.p.risk[row], q.p.sure);
  int64_t num_fresh = length;
  for (int64_t turn = 0; on && turn < q.p.runs; ++turn) {
    int64_t num_free = 0;
    for (int64_t i = 0; i < length; ++i) {
      if (state[i] == kFree) s.free[num_free++] = static_cast<int32_t>(i);
    }
    run(q, num_fresh, num_free);
    for (int64_t n = 0; n < num_free; ++n) {
      const int64_t i = s.free[n];
      const float prior = SetPosition(q.p, start + i).prior() + (q.p.bias ? q.p.bias[start + i] : 0.0f);
      s.p[i] = set_probability(prior + s.p[i]);
      if (turn == 0) score[i] = s.p[i];
    }
    on = choice.pick(OneLane(), length, s.p, state);
    num_fresh = 0;
    for (int64_t i = 0; i < length; ++i) {
      if (state[i] != kFresh) continue;
      s.fresh[num_fresh++] = static_cast<int32_t>(i);
      for (int64_t c = 0; c < s.d; ++c) s.input[c * s.stride + i] += q.w.state[2 * s.d + c] - q.w.state[s.d + c];
    }
  }
  for (int64_t i = 0; i < length; ++i) state[i] = state[i] == kPicked || state[i] == kFresh;
}

void select_set(const SelectSetParams& p, int64_t begin, int64_t end, const SetScratch& s, const SinusoidTable& rotary,
                const SinusoidTable& places) {
  const SetWeightView w(p.weights, p.sizes, p.layers);
  for (int64_t row = begin; row < end; ++row) select_row({p, w, s, rotary, places}, row);
}

}  // namespace unmask::cpu::UNMASK_ISA
