// topk_confidence for one instruction set, see isa.h.
//
// A row is read once from memory, in blocks that stay in the first-level cache for the passes over them:
//   1. the block's maximum and its sum of exp(x - m), m the largest value of the blocks before, while prefetching ahead;
//      sums are rescaled when m grows, and kept in double;
//   2. only if the maximum beats the k-th value so far: candidates for the k largest; the Gumbel-max sample, likewise.
namespace unmask::cpu::UNMASK_ISA {

constexpr int kBlock = 4096;  // elements per block; a multiple of every kChunk; fewer: more ends of blocks to pay for
constexpr float kMaxGrowth = 40.0f;  // exp(40) times kBlock is far from the largest float
constexpr float kMinusInfinity = -__builtin_inff();

// What is known of a row after some of its blocks.
struct RowState {
  float maximum = kMinusInfinity;  // of all entries
  double sum = 0.0;                // of exp(x - maximum)
  double weighted_sum = 0.0;       // of exp(x - maximum) * (x - maximum) * log2(e), if the entropy is wanted
  int found = 0;                   // candidates above -inf in the list
  float value[kMaxTopK];
  int64_t token[kMaxTopK];
  float best_score = kMinusInfinity;  // of the sample
  int64_t sample = -1;
  float sample_value;
};

UNMASK_INLINE vf add_up(const vf v[4]) { return (v[0] + v[1]) + (v[2] + v[3]); }
UNMASK_INLINE vf largest_of(const vf v[4]) { return maximum(maximum(v[0], v[1]), maximum(v[2], v[3])); }

template <typename Type>
static float block_maximum(const typename Type::Element* x, int count) {
  vf best[4];
  for (int w = 0; w < 4; ++w) best[w] = splat(kMinusInfinity);
  for (int i = 0; i < count; i += kChunk) {
    vf v[4];
    Type::load4(x + i, v);
    for (int w = 0; w < 4; ++w) best[w] = maximum(v[w], best[w]);  // a NaN in v is passed over
  }
  return horizontal_max(largest_of(best));
}

// exp(x - m), as a product and a scale, for any m. `exponent` is (x - m) in units of `unit` / log2(e).
struct AnyExponential {
  float m;
  double scale = 1.0, unit = 1.0;

  __attribute__((always_inline)) Product operator()(vf x, vf* exponent) const {
    // Not x * log2e - m * log2e, which would round at the size of m. Clamped so that -inf * 0 does not come up.
    *exponent = maximum(splat(-127.0f), (x - m) * kLog2E);
    return exp2_product(*exponent);
  }
};

#if UNMASK_LANES > 4
// The same in fewer steps where there are fused multiply-adds and permutations. With L = float(log2 e), c = round(m L)
// and S = kTableSize: S (x L - c) = n + f with n an integer, which adding S (127 - c) and 1.5 * 2^23 to S x L leaves in
// the lowest bits, in one instruction; f takes another. Neither rounds at the size of x or m. The lowest bits of n look
// up 2^(j/S), the rest is the exponent, and 2^(f/S) is near 1. All terms have a factor 2^(m L - c) too much, which `scale`
// takes out of their sum.
constexpr float kTableSize = 1 << kTableBits;
constexpr float kFusedLimit = 1e5f;  // |m| up to which 1.5 * 2^23 - S c stays in [2^23, 2^24)

struct FusedExponential {
  float m;
  double scaled = static_cast<double>(m) * static_cast<double>(kLog2E);  // exact
  float c = static_cast<float>(nearbyint(scaled));
  double scale = exp2(c - scaled), unit = kLog2E;
  vf magic = splat(12582912.0f + kTableSize * (127.0f - c));
  vf lowest = splat(m - 87.0f);  // below it the terms are 2^-125, which is nothing beside 1
  vi table = exp2_table();

  __attribute__((always_inline)) Product operator()(vf x, vf* exponent) const {
    const vf y = maximum(lowest, x), log2e = splat(kTableSize * kLog2E);
    const vf shifted = mul_add(y, log2e, magic);
    const vf f = mul_add(y, log2e, magic - shifted);
    *exponent = y - m;
    return {exp2_near_one(f), (vf)(((vi)shifted << (23 - kTableBits)) + lookup(table, (vi)shifted))};
  }
};
#endif

// exp(x - m) of a block, summed; `weighted` gets exp(x - m) * (x - m) * log2(e). NaN in x makes both NaN. Returns the
// block's maximum, NaN aside.
template <typename Type, bool kEntropy, typename Exponential>
static float sum_terms(const typename Type::Element* x, int count, const Exponential& exponential, double* sum,
                       double* weighted) {
  vf total[4] = {}, total_weighted[4] = {}, best[4];
  for (int w = 0; w < 4; ++w) best[w] = splat(kMinusInfinity);
  for (int i = 0; i < count; i += kChunk) {
    vf v[4], exponent;
    Type::load4(x + i, v);
    prefetch<Type>(x, i);
    for (int w = 0; w < 4; ++w) {
      best[w] = maximum(v[w], best[w]);
      const Product e = exponential(v[w], &exponent);
      total[w] = mul_add(e.near_one, e.power, total[w]);
      if (kEntropy) total_weighted[w] = mul_add(e.near_one * e.power, exponent, total_weighted[w]);
    }
  }
  *sum = exponential.scale * horizontal_sum(add_up(total));
  *weighted = exponential.scale * exponential.unit * horizontal_sum(add_up(total_weighted));
  return horizontal_max(largest_of(best));
}

template <typename Type, bool kEntropy>
static float sum_exp(const typename Type::Element* x, int count, float m, double* sum, double* weighted) {
#if UNMASK_LANES > 4
  if (m < kFusedLimit && m > -kFusedLimit) {
    return sum_terms<Type, kEntropy>(x, count, FusedExponential{m}, sum, weighted);
  }
#endif
  return sum_terms<Type, kEntropy>(x, count, AnyExponential{m}, sum, weighted);
}

// Makes the row's sums relative to a new, larger maximum.
template <bool kEntropy>
static void raise_maximum(float largest, RowState* row) {
  if (row->maximum > kMinusInfinity) {
    const double growth = static_cast<double>(largest) - static_cast<double>(row->maximum);
    const double factor = exp(-growth);
    if (kEntropy) {
      row->weighted_sum = factor == 0.0 ? 0.0 : factor * (row->weighted_sum - growth * kLog2E * row->sum);
    }
    row->sum *= factor;
  }
  row->maximum = largest;
}

// Adds exp(x - maximum) of the block to the sums and returns the block's maximum. A NaN makes the sum NaN.
template <typename Type, bool kEntropy>
static float accumulate(const typename Type::Element* x, int count, RowState* row) {
  double sum, weighted;
  float largest;
  if (row->maximum > kMinusInfinity) {
    // One pass: terms relative to the maximum of the blocks before, as long as this one's is not much larger.
    largest = sum_exp<Type, kEntropy>(x, count, row->maximum, &sum, &weighted);
    if (largest <= row->maximum + kMaxGrowth) {
      row->sum += sum;
      if (kEntropy) row->weighted_sum += weighted;
      if (largest > row->maximum) raise_maximum<kEntropy>(largest, row);
      return largest;
    }
  } else {
    largest = block_maximum<Type>(x, count);
  }
  if (largest == __builtin_inff()) return largest;
  if (largest > kMinusInfinity) raise_maximum<kEntropy>(largest, row);
  // Nothing but -inf so far: any finite number keeps -inf - m from being NaN.
  sum_exp<Type, kEntropy>(x, count, largest > kMinusInfinity ? largest : 0.0f, &sum, &weighted);
  row->sum += sum;
  if (kEntropy) row->weighted_sum += weighted;
  return largest;
}

// Puts a candidate into the descending list; among equal values the earlier, lower id stays in front.
static void insert(RowState* row, int k, float value, int64_t token) {
  int place = row->found < k ? row->found++ : k - 1;
  for (; place > 0 && row->value[place - 1] < value; --place) {
    row->value[place] = row->value[place - 1];
    row->token[place] = row->token[place - 1];
  }
  row->value[place] = value;
  row->token[place] = token;
}

// Value that a candidate must exceed to enter the list.
static inline float entry_value(const RowState& row, int k) {
  return row.found < k ? kMinusInfinity : row.value[k - 1];
}

template <typename Type>
static void update_list(const TopkConfidenceParams& params, const typename Type::Element* x, int count, int64_t first,
                        RowState* row) {
  float entry = entry_value(*row, params.k);
  for (int i = 0; i < count; i += kChunk) {
    vf v[4];
    Type::load4(x + i, v);
    // A NaN can hide a value here, but then the row is poisoned anyway.
    if (!any(largest_of(v) > entry)) continue;
    for (int j = i; j < i + kChunk; ++j) {
      const float value = Type::to_float(x[j]);
      if (!(value > entry) || params.excluded(first + j)) continue;
      insert(row, params.k, value, first + j);
      entry = entry_value(*row, params.k);
    }
  }
}

// Gumbel-max over a block. A token beats the best score b only if its gumbel exceeds b - x/T, that is, if its uniform
// draw is below 1 - exp(-exp(x/T - b)) <= exp(x/T - b). That is checked for all lanes first, with slack for rounding;
// the few that pass are scored by the definition. So the result is the same on every instruction set.
template <typename Type>
static void update_sample(const TopkConfidenceParams& params, const DrawKey& draw, const typename Type::Element* x,
                          int count, int64_t first, RowState* row) {
  vu lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = static_cast<uint32_t>(i);
  for (int i = 0; i < count; i += kChunk) {
    vf v[4], bound[4];
    load_by_four<Type>(x + i, v);
    const float best = row->best_score;
    const float slack = best > kMinusInfinity ? 1e-3f + 1e-6f * (best < 0 ? -best : best) : 0.0f;
    vi possible = {};
    for (int w = 0; w < 4; ++w) {
      const vf t = mul_add(v[w], splat(params.inverse_temperature), splat(slack - best));
      bound[w] = exp2_fast(minimum(t, splat(1.0f)) * kLog2E);
      possible |= bound[w] > 5.8e-11f;  // below any uniform draw, which is at least 2^-33
    }
    if (!any(possible)) continue;
    vu word[4];
    const uint32_t group = static_cast<uint32_t>((first + i) / 4);
    philox_lanes(draw, lane + group, word);
    vi pass[4];
    possible = vi{};
    for (int w = 0; w < 4; ++w) {
      // Rounded down, so never above the uniform draw.
      const vf below = __builtin_convertvector((vi)(word[w] >> 8), vf) * 5.9604644775390625e-8f;
      pass[w] = below < bound[w];
      possible |= pass[w];
    }
    if (!any(possible)) continue;
    for (int j = 0; j < kChunk; ++j) {
      const int64_t token = first + i + j;
      if (!pass[j % 4][j / 4] || params.excluded(token)) continue;
      const float value = v[j % 4][j / 4];
      const float score = __builtin_fmaf(value, params.inverse_temperature, gumbel(word[j % 4][j / 4]));
      if (!(score > row->best_score)) continue;
      row->best_score = score;
      row->sample = token;
      row->sample_value = value;
    }
  }
}

// All passes over `count` elements (a multiple of kChunk) from id `first` on. False if the row is poisoned.
template <typename Type, bool kEntropy>
static bool update(const TopkConfidenceParams& params, const DrawKey* draw, const typename Type::Element* x, int count,
                   int64_t first, RowState* row) {
  const float largest = accumulate<Type, kEntropy>(x, count, row);
  if (largest == __builtin_inff()) return false;
  if (largest > entry_value(*row, params.k)) update_list<Type>(params, x, count, first, row);
  if (draw != nullptr) {
    const float bound = __builtin_fmaf(largest, params.inverse_temperature, kGumbelMax);
    if (bound > row->best_score) update_sample<Type>(params, *draw, x, count, first, row);
  }
  return true;
}

// Fills up the list with the lowest ids whose entry is -inf, where fewer than k candidates are above it.
template <typename Type>
static void complete_list(const TopkConfidenceParams& params, const typename Type::Element* x, RowState* row) {
  for (int64_t token = 0; token < params.vocab && row->found < params.k; ++token) {
    if (Type::to_float(x[token]) > kMinusInfinity || params.excluded(token)) continue;
    row->value[row->found] = kMinusInfinity;
    row->token[row->found++] = token;
  }
}

// Where every score is -inf, the lowest id is the sample.
template <typename Type>
static void complete_sample(const TopkConfidenceParams& params, const typename Type::Element* x, RowState* row) {
  if (row->sample >= 0) return;
  int64_t token = 0;
  while (params.excluded(token)) ++token;
  row->sample = token;
  row->sample_value = Type::to_float(x[token]);
}

template <typename Type, bool kEntropy>
static bool process_row(const TopkConfidenceParams& params, const DrawKey* draw, const typename Type::Element* x,
                        RowState* row) {
  const int64_t whole = params.vocab / kChunk * kChunk;
  for (int64_t first = 0; first < whole; first += kBlock) {
    const int count = static_cast<int>(whole - first < kBlock ? whole - first : kBlock);
    if (!update<Type, kEntropy>(params, draw, x + first, count, first, row)) return false;
  }
  if (whole < params.vocab) {
    typename Type::Element rest[kChunk];
    for (int i = 0; i < kChunk; ++i) rest[i] = whole + i < params.vocab ? x[whole + i] : Type::kLowest;
    if (!update<Type, kEntropy>(params, draw, rest, kChunk, whole, row)) return false;
  }
  if (!(row->maximum > kMinusInfinity) || row->sum != row->sum) return false;
  if (row->sum < 1.0) row->sum = 1.0;  // only by rounding: the largest term is 1, and no probability may exceed 1
  if (row->found < params.k) complete_list<Type>(params, x, row);
  if (draw != nullptr) complete_sample<Type>(params, x, row);
  return true;
}

static void fill(const TopkConfidenceParams& params, int64_t index, float confidence, float statistic, int64_t id) {
  for (int i = 0; i < params.k; ++i) {
    params.confidence[index * params.k + i] = confidence;
    params.token[index * params.k + i] = id;
  }
  params.sample[index] = id;
  params.sample_confidence[index] = confidence;
  if (params.logsumexp != nullptr) params.logsumexp[index] = statistic;
  if (params.entropy != nullptr) params.entropy[index] = statistic;
}

static inline float probability(const RowState& row, float value) {
  return static_cast<float>(exp(static_cast<double>(value) - static_cast<double>(row.maximum)) / row.sum);
}

static void write_row(const TopkConfidenceParams& params, int64_t index, const RowState& row, bool sampled) {
  for (int i = 0; i < params.k; ++i) {
    params.confidence[index * params.k + i] = probability(row, row.value[i]);
    params.token[index * params.k + i] = row.token[i];
  }
  params.sample[index] = sampled ? row.sample : row.token[0];
  params.sample_confidence[index] = probability(row, sampled ? row.sample_value : row.value[0]);
  const double log_sum = log(row.sum);
  if (params.logsumexp != nullptr) params.logsumexp[index] = static_cast<float>(row.maximum + log_sum);
  if (params.entropy != nullptr) {
    const double entropy = log_sum - 0.69314718055994530942 * row.weighted_sum / row.sum;
    params.entropy[index] = static_cast<float>(entropy > 0.0 ? entropy : 0.0);
  }
}

template <typename Type, bool kEntropy>
static void process_rows(const TopkConfidenceParams& params, int64_t begin, int64_t end) {
  const auto* logits = static_cast<const typename Type::Element*>(params.logits);
  const bool sampled = params.inverse_temperature > 0.0f;
  for (int64_t index = begin; index < end; ++index) {
    if (params.select != nullptr && params.select[index] == 0) {
      fill(params, index, 0.0f, 0.0f, -1);
      continue;
    }
    const int64_t source = params.rows != nullptr ? params.rows[index] : index;
    const DrawKey draw = sampled ? params.draw_key(index, source) : DrawKey{};
    RowState row;
    if (process_row<Type, kEntropy>(params, sampled ? &draw : nullptr, logits + params.offset(source), &row)) {
      write_row(params, index, row, sampled);
    } else {
      fill(params, index, __builtin_nanf(""), __builtin_nanf(""), -1);
    }
  }
}

template <typename Type>
static void process_rows(const TopkConfidenceParams& params, int64_t begin, int64_t end) {
  return params.entropy ? process_rows<Type, true>(params, begin, end) : process_rows<Type, false>(params, begin, end);
}

void topk_confidence(const TopkConfidenceParams& params, int64_t begin, int64_t end) {
  if (params.dtype == DType::kFloat32) return process_rows<Float32>(params, begin, end);
  if (params.dtype == DType::kFloat16) return process_rows<Float16>(params, begin, end);
  process_rows<BFloat16>(params, begin, end);
}

}  // namespace unmask::cpu::UNMASK_ISA
