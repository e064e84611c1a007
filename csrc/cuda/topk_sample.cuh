// Gumbel-max sampling while streaming: most random numbers are never turned into a Gumbel draw.
//
// A score x / T + g beats the best one so far only if g is large, and g = -log(E) is large only if the uniform v that
// E = -log(1 - v) >= v comes from is small: v <= exp(x / T - best). That test costs one exponential instead of two
// logarithms; what passes it (a handful per thread) is evaluated by random.h's exact formula.
#pragma once
#include "topk_row.cuh"

namespace unmask::cuda {

struct Found {
  float best = -INFINITY;
  uint32_t id = kNowhere;  // none yet

  UNMASK_DEVICE void consider(uint32_t candidate, float score) {
    if (score > best || id == kNowhere || (score == best && candidate < id)) {
      best = score;
      id = candidate;
    }
  }
};

struct Sampler {
  DrawKey key;
  float inverse_temperature;
  Found found = {};         // by this thread
  float bound = -INFINITY;  // best of the warp, as far as known

  UNMASK_DEVICE uint64_t result() const { return found.id == kNowhere ? 0 : make_key(found.best, found.id); }
};

// Random words of the vector's elements: element i is token 4 * quad + offset + i, its word is token % 4 of draw
// token / 4. `offset` is the same for all vectors of a row.
template <int kWidth>
UNMASK_DEVICE void vector_bits(const DrawKey& key, int32_t quad, int offset, uint32_t (&bits)[kWidth]) {
  constexpr int kQuads = kWidth / 4 + 1;
  uint32_t words[4 * kQuads];
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    Philox4 drawn{{0, 0, 0, 0}};
    if (q < kQuads - 1 || offset != 0) drawn = key.words(static_cast<uint32_t>(quad + q));
#pragma unroll
    for (int w = 0; w < 4; ++w) words[4 * q + w] = drawn.word[w];
  }
  uint32_t half[kWidth + 2];
#pragma unroll
  for (int i = 0; i < kWidth + 2; ++i) half[i] = offset & 1 ? words[i + 1] : words[i];
#pragma unroll
  for (int i = 0; i < kWidth; ++i) bits[i] = offset & 2 ? half[i + 2] : half[i];
}

// What of a vector, whose first id is `first`, beats the sampler's best; `bar` is a bit below the best that counts. Out of
// line, as the loop would hold it four times.
template <typename Format>
UNMASK_DEVICE_COLD Found sample_elements(Found found, const DrawKey key, float inverse_temperature, float bar,
                                         uint4 raw, uint32_t first, const TopkConfidenceParams& p) {
  uint32_t bits[Format::kWidth];
  vector_bits<Format::kWidth>(key, static_cast<int32_t>(first) >> 2, static_cast<int>(first & 3), bits);
  float x[Format::kWidth];
  unpack<Format>(raw, x);
  unsigned passed = 0;
#pragma unroll
  for (int i = 0; i < Format::kWidth; ++i) {
    const float limit = exp2_fast((fmaf(x[i], inverse_temperature, -bar)) * kLog2e);
    passed |= uniform(bits[i]) > limit ? 0u : 1u << i;
  }
  for (; passed != 0; passed &= passed - 1) {
    const int place = __ffs(static_cast<int>(passed)) - 1;
    float value = x[0];
    uint32_t word = bits[0];
#pragma unroll
    for (int i = 1; i < Format::kWidth; ++i) {  // selects: an array indexed by a variable would lie in memory
      value = i == place ? x[i] : value;
      word = i == place ? bits[i] : word;
    }
    const uint32_t id = first + static_cast<uint32_t>(place);
    if (id < p.vocab && !p.excluded(id)) found.consider(id, fmaf(value, inverse_temperature, gumbel(word)));
  }
  return found;
}

// Called by whole warps. `largest` is the vector's largest element or more. `refresh`: compare with the best of the warp's
// other lanes as well from now on.
template <typename Format>
UNMASK_DEVICE void sample_vector(const Row<Format>& row, const uint4& raw, uint32_t vector, float largest, bool refresh,
                                 Sampler* sampler) {
  const uint32_t first = row.id(vector, 0);
  if (refresh) {
    if (sampler->found.id == kNowhere && vector < row.end) {  // something to compare with: usually a good score
      const Candidate top = largest_candidate(row, raw, vector);
      if (top.id != kNowhere) {
        const Philox4 drawn = sampler->key.words(top.id / 4);
        const uint32_t low = top.id & 1 ? drawn.word[1] : drawn.word[0];
        const uint32_t high = top.id & 1 ? drawn.word[3] : drawn.word[2];
        const float draw = gumbel(top.id & 2 ? high : low);
        sampler->found.consider(top.id, fmaf(top.value, sampler->inverse_temperature, draw));
      }
    }
    sampler->bound = fmaxf(sampler->bound, warp_max(sampler->found.best));
  }
  // Covers the rounding of scores, of this test and of the exact formula.
  const float bar = sampler->bound - (1e-3f + 5e-7f * fabsf(sampler->bound));
  // Comparisons are such that a NaN skips nothing.
  if (vector >= row.end || fmaf(largest, sampler->inverse_temperature, kGumbelMax) < bar) return;
  sampler->found =
      sample_elements<Format>(sampler->found, sampler->key, sampler->inverse_temperature, bar, raw, first, row.p);
}

}  // namespace unmask::cuda
