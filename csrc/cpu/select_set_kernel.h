// select_set for one instruction set; policy_layers.h comes before it. No include guard.
namespace unmask::cpu::UNMASK_ISA {

// A row of the batch in hand.
struct SetRow {
  const SelectSetParams& p;
  const SetWeightView& w;
  const SetScratch& s;
  RotaryTable rotary;
};

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

// Calls work(rows, count, lanes) for chunks of `rows`.
template <typename Work>
UNMASK_INLINE void in_chunks(const int32_t* rows, int64_t total, Work work) {
  for (int64_t first = 0; first < total; first += kRows) {
    const int64_t count = total - first < kRows ? total - first : kRows;
    work(rows + first, count, round_to_lanes(count));
  }
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
  const int64_t length = s.length;
  const float *x = q.p.x + row * length * s.d, *prior = q.p.prior + row * length;
  uint8_t* state = q.p.select + row * length;
  float* score = q.p.score + row * length;
  int64_t num_free = 0;
  for (int64_t i = 0; i < length; ++i) {
    state[i] = q.p.allowed[row * length + i] ? kFree : kBarred;
    score[i] = 0.0f;
    s.all[i] = s.fresh[i] = static_cast<int32_t>(i);
    num_free += state[i] == kFree;
  }
  for (int64_t c = 0; c < s.d && num_free; ++c) {
    for (int64_t i = 0; i < length; ++i) s.input[c * s.stride + i] = x[i * s.d + c];
  }
  SetChoice choice(q.p.risk[row], q.p.sure);
  int64_t num_fresh = length;
  bool on = num_free > 0;
  for (int64_t turn = 0; on && turn < q.p.runs; ++turn) {
    num_free = 0;
    for (int64_t i = 0; i < length; ++i) {
      if (state[i] == kFree) s.free[num_free++] = static_cast<int32_t>(i);
    }
    run(q, num_fresh, num_free);
    for (int64_t n = 0; n < num_free; ++n) s.p[s.free[n]] = set_probability(prior[s.free[n]] + s.p[s.free[n]]);
    for (int64_t n = 0; n < num_free && turn == 0; ++n) score[s.free[n]] = s.p[s.free[n]];
    on = choice.pick(OneLane(), length, s.p, state);
    num_fresh = 0;
    for (int64_t i = 0; i < length; ++i) {
      if (state[i] != kFresh) continue;
      s.fresh[num_fresh++] = static_cast<int32_t>(i);
      for (int64_t c = 0; c < s.d; ++c) s.input[c * s.stride + i] += q.w.change[c];
    }
  }
  for (int64_t i = 0; i < length; ++i) state[i] = state[i] == kPicked || state[i] == kFresh;
}

void select_set(const SelectSetParams& p, int64_t begin, int64_t end, const SetScratch& s, const RotaryTable& rotary) {
  const SetWeightView w(p.weights, p.sizes, p.layers);
  for (int64_t row = begin; row < end; ++row) select_row({p, w, s, rotary}, row);
}

}  // namespace unmask::cpu::UNMASK_ISA
