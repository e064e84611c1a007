// A row of logits as 16-byte vectors, and what a thread gathers while it streams over some of them.
//
// Vectors are aligned in memory, so the first and the last one may stick out of the row: id(v, i) = v * W - shift + i
// for element i of vector v (W elements each), and elements with an id outside [0, V) read as -inf.
#pragma once
#include <cuda_fp16.h>
#include <float.h>

#include "../ops/random.h"
#include "../ops/topk_confidence.h"
#include "portable.cuh"

namespace unmask::cuda {

constexpr int kTopkThreads = 256;
constexpr int kTopkBatch = 4;                     // 16-byte loads a thread has under way
constexpr int kTile = kTopkThreads * kTopkBatch;  // vectors of a block's batch
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr uint32_t kNowhere = 0xffffffffu;

// The dtypes: W elements to a vector; the value of an element, and the bits of -inf.
struct Float32 {
  using Element = uint32_t;
  static constexpr int kWidth = 4;
  static constexpr uint32_t kMinusInfinity = 0xff800000u;
  static UNMASK_DEVICE float value(Element bits) { return __uint_as_float(bits); }
};

struct BFloat16 {
  using Element = uint16_t;
  static constexpr int kWidth = 8;
  static constexpr uint32_t kMinusInfinity = 0xff80u;
  static UNMASK_DEVICE float value(Element bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }
};

struct Float16 {
  using Element = uint16_t;
  static constexpr int kWidth = 8;
  static constexpr uint32_t kMinusInfinity = 0xfc00u;
  static UNMASK_DEVICE float value(Element bits) { return __half2float(__ushort_as_half(bits)); }
};

template <typename Format>
UNMASK_DEVICE void unpack(const uint4& raw, float (&x)[Format::kWidth]) {
  constexpr int kPerWord = Format::kWidth / 4, kBits = 32 / kPerWord;
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < Format::kWidth; ++i) {
    x[i] = Format::value(static_cast<typename Format::Element>(words[i / kPerWord] >> (i % kPerWord * kBits)));
  }
}

// A vector that sticks out of its row or lies outside the block's part, element by element: -inf where nothing is.
// `id` is the vector's first. Rare, hence out of line: the hot loop stays small.
template <typename Format>
UNMASK_DEVICE_COLD uint4 load_ragged(const typename Format::Element* first, uint32_t id, uint32_t vocab) {
  constexpr int kPerWord = Format::kWidth / 4, kBits = 32 / kPerWord;
  uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < Format::kWidth; ++i, ++id) {
    const uint32_t bits = id < vocab ? first[id] : Format::kMinusInfinity;
    words[i / kPerWord] |= bits << (i % kPerWord * kBits);
  }
  return uint4{words[0], words[1], words[2], words[3]};
}

// One row, and the part of its vectors [begin, end) that this block reads.
template <typename Format>
struct Row {
  using Element = typename Format::Element;
  static constexpr int kWidth = Format::kWidth;

  const TopkConfidenceParams& p;
  const Element* first;  // id 0
  const Element* base;   // vector 0, 16-byte aligned
  uint32_t vocab;
  uint32_t shift;  // elements of vector 0 before the row
  uint32_t begin, end;
  uint32_t whole_end;  // end of the part's vectors that do not stick out of the row's end

  UNMASK_DEVICE Row(const TopkConfidenceParams& params, int64_t source, unsigned part, int log2_parts)
      : p(params),
        first(static_cast<const Element*>(p.logits) + p.offset(source)),
        vocab(static_cast<uint32_t>(p.vocab)) {
    shift = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(first) % 16 / sizeof(Element));
    base = first - shift;
    const uint64_t span = static_cast<uint64_t>(vocab) + shift;
    const uint64_t vectors = (span + kWidth - 1) / kWidth;
    begin = static_cast<uint32_t>(vectors * part >> log2_parts);
    end = static_cast<uint32_t>(vectors * (part + 1) >> log2_parts);
    const uint32_t whole = static_cast<uint32_t>(span / kWidth);  // vectors that end inside the row
    whole_end = end < whole ? end : whole;
  }

  // Ids before the row wrap around and so are outside [0, V) too.
  UNMASK_DEVICE uint32_t id(uint32_t vector, int i) const { return vector * kWidth - shift + static_cast<uint32_t>(i); }
  UNMASK_DEVICE float value(uint32_t id) const { return Format::value(first[id]); }

  UNMASK_DEVICE const Element* at(uint32_t vector) const { return base + static_cast<uint64_t>(vector) * kWidth; }
  UNMASK_DEVICE uint4 load_whole(const Element* p, int offset) const { return load_streaming(p + offset * kWidth); }
  // The vector `offset` after `vector`, which is at `p` and `left` before the first one that is not whole. The caller
  // counts `left` down, which costs less than comparing with the ends of the part.
  UNMASK_DEVICE uint4 load(const Element* p, uint32_t vector, int offset, int left) const {
    if (offset < left) return load_whole(p, offset);
    const uint32_t at = vector + static_cast<uint32_t>(offset);
    return load_ragged<Format>(first, at < end ? id(at, 0) : vocab, vocab);  // past the end of the part: no id at all
  }
  // The vector `vector`, which is at `p`: vector 0 may begin before the row.
  UNMASK_DEVICE uint4 load_first(const Element* p, uint32_t vector) const {
    return load(p, vector, 0, vector < whole_end && (vector != 0 || shift == 0));
  }
  UNMASK_DEVICE bool is_candidate(uint32_t id) const { return id < vocab && !p.excluded(id); }
  // Whether an excluded id is within vectors [from, from + kTile). The same answer in every thread.
  UNMASK_DEVICE bool excludes_any(uint32_t from) const {
    for (int e = 0; e < p.num_exclude; ++e) {
      if ((static_cast<uint32_t>(p.exclude[e]) + shift) / kWidth - from < kTile) return true;
    }
    return false;
  }
};

// exp(x - reference) as exp2 of fmaf(x, factor, -scaled), in which only the result is rounded. `scaled` is a rounded
// product, so that all exponents of a reference are off by the same, at most 64: a factor of all of a row's
// exponentials that cancels where only this exponent is used with them. (So nothing may contract that product with a
// sum: csrc/build.json has -fmad=false, and everything that should be fused is spelled as fmaf.) From kFar on it would be too large; but there
// floats are at least 64 apart, and exp2(x - reference) is as good as exp(x - reference): 1, or next to nothing.
struct Exponent {
  static constexpr float kFar = 1073741824.0f;  // 2^30
  float factor, scaled;

  UNMASK_DEVICE explicit Exponent(float reference) {
    factor = fabsf(reference) < kFar ? kLog2e : 1.0f;
    scaled = reference * factor;
  }
  UNMASK_DEVICE float of(float x) const { return fmaf(x, factor, -scaled); }
};

// Softmax sums relative to a reference, which is at most kLag below the largest logit: of e and of e * log2 e, where
// e = exp2(Exponent(reference).of(x)). Any reference will do, and one that lags behind the maximum is seldom moved.
struct Sums {
  static constexpr float kLag = 8.0f;
  float reference = -FLT_MAX;  // finite, so that x - reference is never -inf + inf
  float sum = 0.0f;
  float weighted = 0.0f;

  // Moves the reference to `to` >= reference.
  template <bool kEntropy = true>
  UNMASK_DEVICE void raise(float to) {
    const Exponent old(reference), now(to);
    const float delta = old.factor == now.factor ? old.scaled - now.scaled : -INFINITY;  // at least 64 apart
    const float scale = exp2_fast(delta);
    if (kEntropy) weighted = scale * fmaf(sum, fmaxf(delta, -1e4f), weighted);  // a finite factor: sums of 0 stay 0
    sum *= scale;
    reference = to;
  }
  // Adds one vector; a NaN or +inf in it makes the sum NaN, for good. `exponent` is that of the reference.
  template <bool kEntropy, int kWidth>
  UNMASK_DEVICE void add_vector(const float (&x)[kWidth], float vector_max, Exponent* exponent) {
    if (vector_max > reference + kLag) {
      *this = raised<kEntropy>(*this, vector_max);
      *exponent = Exponent(reference);
    }
    float d[kWidth], e[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      d[i] = exponent->of(x[i]);
      e[i] = exp2_fast(d[i]);
    }
    if (kEntropy) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) weighted = fmaf(e[i], fmaxf(d[i], -200.0f), weighted);  // not 0 * -inf
    }
#pragma unroll
    for (int width = kWidth / 2; width > 0; width /= 2) {
#pragma unroll
      for (int i = 0; i < width; ++i) e[i] += e[i + width];
    }
    sum += e[0];
  }

 private:
  // Rare, hence out of line: inline it would be predicated code, which costs its time whether it is needed or not.
  template <bool kEntropy>
  static UNMASK_DEVICE_COLD Sums raised(Sums sums, float to) {
    sums.raise<kEntropy>(to);
    return sums;
  }
};

// Largest element (NaN aside).
template <int kWidth>
UNMASK_DEVICE float vector_max(const float (&x)[kWidth]) {
  float m[kWidth];
#pragma unroll
  for (int i = 0; i < kWidth; ++i) m[i] = x[i];
#pragma unroll
  for (int width = kWidth / 2; width > 0; width /= 2) {
#pragma unroll
    for (int i = 0; i < width; ++i) m[i] = fmaxf(m[i], m[i + width]);
  }
  return m[0];
}

// The largest candidate of a vector whose first id is `id`, and its id; kNowhere if there is no candidate. Rare, hence
// out of line.
struct Candidate {
  float value;
  uint32_t id;
};
template <typename Format>
UNMASK_DEVICE_COLD Candidate largest_candidate(uint4 raw, uint32_t id, const TopkConfidenceParams& p) {
  float x[Format::kWidth];
  unpack<Format>(raw, x);
  Candidate best{-INFINITY, kNowhere};
#pragma unroll
  for (int i = 0; i < Format::kWidth; ++i, ++id) {
    if (id >= p.vocab || p.excluded(id)) continue;
    if (best.id == kNowhere || x[i] > best.value) {
      best.value = fmaxf(x[i], -INFINITY);  // NaN counts as -inf; its row is poisoned anyway
      best.id = id;
    }
  }
  return best;
}
template <typename Format>
UNMASK_DEVICE Candidate largest_candidate(const Row<Format>& row, const uint4& raw, uint32_t vector) {
  return largest_candidate<Format>(raw, row.id(vector, 0), row.p);
}

// The best candidate among some of a thread's vectors: its value and the first vector that holds it. The vector itself
// would take four registers and as many moves; it is read again instead.
struct Best {
  float value = NAN;  // nothing yet
  uint32_t vector = kNowhere;

  // `candidate` is the largest of vector `at`, which has candidates.
  UNMASK_DEVICE void consider(float candidate, uint32_t at) {
    if (!(candidate <= value)) {
      value = candidate;
      vector = at;
    }
  }
};

}  // namespace unmask::cuda
