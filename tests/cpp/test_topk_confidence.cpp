// topk_confidence on the CPU, each instruction set that this processor has, against double precision.
#include "ops/topk_confidence.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "cpu/isa.h"
#include "ops/random.h"

namespace {

using unmask::DType;
using unmask::TopkConfidenceParams;
using unmask::cpu::Isa;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

std::vector<Isa> isas() {
  std::vector<Isa> found;
  for (const Isa isa : unmask::cpu::kBestFirst) {
    if (unmask::cpu::isa_supported(isa)) found.push_back(isa);
  }
  return found;
}

void run(Isa isa, const TopkConfidenceParams& params) {
  unmask::cpu::active_isa() = isa;
  unmask::cpu::topk_confidence(params, 0, params.num_rows);
}

uint16_t to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<uint16_t>(bits >> 16);
}

float from_bfloat16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// The value of a float16 by its definition.
float from_float16(uint16_t x) {
  const float sign = x & 0x8000 ? -1.0f : 1.0f;
  const int exponent = (x >> 10) & 31, fraction = x & 1023;
  if (exponent == 31) return fraction ? kNaN : sign * kInf;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(fraction), -24);
  return sign * std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
}

// One row, its parameters and room for its results. The row is allocated to its exact size, behind `offset` elements, so
// that a sanitizer sees a read past its end and one of an address that is not a multiple of its type's.
struct OneRow {
  std::vector<float> row;       // values as read
  std::vector<float> as_float;  // storage, one of the two
  std::vector<uint16_t> as_half;
  std::vector<float> confidence;
  std::vector<int64_t> token;
  int64_t sample = -7, seed = 42, counter[3] = {3, 5, 7};
  float sample_confidence = -7, logsumexp = -7, entropy = -7;
  TopkConfidenceParams params{};

  OneRow(const std::vector<float>& values, int k, DType dtype = DType::kFloat32, size_t offset = 0)
      : as_float(offset, kNaN), as_half(offset, 0x7fff), confidence(k), token(k) {
    for (float x : values) {
      as_float.push_back(x);
      as_half.push_back(to_bfloat16(x));
      const uint16_t half = as_half.back();
      row.push_back(dtype == DType::kFloat32    ? x
                    : dtype == DType::kBFloat16 ? from_bfloat16(half)
                                                : from_float16(half));
    }
    as_float.shrink_to_fit();
    as_half.shrink_to_fit();
    params.logits = as_half.data() + offset;
    if (dtype == DType::kFloat32) params.logits = as_float.data() + offset;
    params.dtype = dtype;
    params.num_rows = params.num_source_rows = params.inner = 1;
    params.vocab = static_cast<int64_t>(row.size());
    params.stride_inner = params.vocab;
    params.k = k;
    params.confidence = confidence.data();
    params.token = token.data();
    params.sample = &sample;
    params.sample_confidence = &sample_confidence;
    params.logsumexp = &logsumexp;
    params.entropy = &entropy;
    params.seed = &seed;
    params.counter = counter;
  }

  // Ids in the order of the list.
  std::vector<int64_t> order() const {
    std::vector<int64_t> ids(row.size());
    std::iota(ids.begin(), ids.end(), 0);
    std::stable_sort(ids.begin(), ids.end(), [this](int64_t a, int64_t b) { return row[a] > row[b]; });
    return ids;
  }

  void expect_right() const {
    const std::vector<int64_t> ids = order();
    const double m = row[ids[0]];
    double sum = 0;
    for (float x : row) sum += std::exp(x - m);
    double expected_entropy = std::log(sum);
    for (float x : row) {
      if (x > -kInf) expected_entropy -= std::exp(x - m) / sum * (x - m);
    }
    for (size_t i = 0; i < token.size(); ++i) {
      ASSERT_EQ(token[i], ids[i]) << "place " << i << " of V = " << row.size();
      ASSERT_NEAR(confidence[i], std::exp(row[ids[i]] - m) / sum, 1e-6);
    }
    ASSERT_NEAR(logsumexp, m + std::log(sum), 1e-6 * (1 + std::fabs(m)));
    ASSERT_NEAR(entropy, expected_entropy, 1e-5);
  }

  // The sample by the definition in ops/topk_confidence.h, in the kernels' own arithmetic.
  int64_t expected_sample() const {
    int64_t best = -1;
    float best_score = -kInf;
    for (int64_t id = 0; id < params.vocab; ++id) {
      const unmask::Philox4 draw = unmask::philox4x32(
          static_cast<uint64_t>(seed), static_cast<uint32_t>(id / 4), static_cast<uint32_t>(counter[1]),
          static_cast<uint32_t>(counter[2]), static_cast<uint32_t>(counter[0]));
      const float score = std::fmaf(row[id], params.inverse_temperature, unmask::gumbel(draw.word[id % 4]));
      if (best < 0 || score > best_score) {
        best = id;
        best_score = score;
      }
    }
    return best;
  }
};

std::vector<float> normal(size_t count, float scale, unsigned seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> distribution(0, scale);
  std::vector<float> values(count);
  for (float& x : values) x = distribution(engine);
  return values;
}

TEST(TopkConfidence, AgreesWithDoubleForEverySize) {
  for (Isa isa : isas()) {
    for (size_t vocab = 1; vocab < 300; ++vocab) {
      OneRow row(normal(vocab, 3.0f, vocab), static_cast<int>(std::min<size_t>(vocab, 7)));
      run(isa, row.params);
      row.expect_right();
    }
    for (size_t vocab : {1023, 1024, 1025, 2048, 5000, 126464}) {
      OneRow row(normal(vocab, 3.0f, vocab), 64);
      run(isa, row.params);
      row.expect_right();
    }
  }
}

TEST(TopkConfidence, ReadsRowsOfAnyDtypeWhereverTheyBegin) {
  for (Isa isa : isas()) {
    for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
      for (size_t offset : {0, 1, 2, 3}) {
        for (size_t vocab : {5, 31, 64, 129, 3001}) {
          OneRow row(normal(vocab, 3.0f, vocab), 5, dtype, offset);
          row.params.inverse_temperature = 1.0f;
          const int64_t expected = row.expected_sample();
          run(isa, row.params);
          row.expect_right();
          ASSERT_EQ(row.sample, expected) << "V = " << vocab << ", offset " << offset;
        }
      }
    }
  }
}

TEST(TopkConfidence, ReadsEveryFloat16) {
  // Each finite float16 takes its turn beside 0, so its probability gives it away.
  for (Isa isa : isas()) {
    for (uint32_t bits = 0; bits < 0x10000; bits += 7) {
      const float value = from_float16(static_cast<uint16_t>(bits));
      if (!std::isfinite(value)) continue;
      OneRow row({0.0f, 0.0f}, 1, DType::kFloat16);
      row.as_half[1] = static_cast<uint16_t>(bits);
      run(isa, row.params);
      ASSERT_NEAR(row.confidence[0], 1 / (1 + std::exp(-std::fabs(static_cast<double>(value)))), 1e-6)
          << std::hex << bits;
      ASSERT_EQ(row.token[0], value > 0 ? 1 : 0) << std::hex << bits;
    }
  }
}

TEST(TopkConfidence, DrawsByTheDefinitionOnEveryInstructionSet) {
  for (size_t vocab : {1, 3, 4, 5, 100, 1024, 4099, 30000}) {
    for (float scale : {0.0f, 0.5f, 5.0f, 500.0f}) {
      for (float inverse : {0.1f, 1.0f, 20.0f}) {
        OneRow row(normal(vocab, scale, static_cast<unsigned>(vocab)), 1);
        row.params.inverse_temperature = inverse;
        row.seed = static_cast<int64_t>(vocab * 1000003) - 7;
        const int64_t expected = row.expected_sample();
        for (Isa isa : isas()) {
          run(isa, row.params);
          ASSERT_EQ(row.sample, expected) << "V = " << vocab << ", scale " << scale << ", 1/T " << inverse;
        }
      }
    }
  }
}

TEST(TopkConfidence, PoisonedAndSkippedRows) {
  for (Isa isa : isas()) {
    for (size_t place : {0, 50, 1024, 1999}) {
      for (float bad : {kNaN, -kNaN, kInf}) {
        OneRow row(normal(2000, 1.0f, 1), 2);
        row.as_float[place] = bad;
        row.params.inverse_temperature = 1.0f;
        run(isa, row.params);
        EXPECT_TRUE(std::isnan(row.confidence[0]) && std::isnan(row.confidence[1]) && std::isnan(row.entropy));
        EXPECT_TRUE(std::isnan(row.sample_confidence) && std::isnan(row.logsumexp));
        EXPECT_EQ(row.token, (std::vector<int64_t>{-1, -1}));
        EXPECT_EQ(row.sample, -1);
      }
    }
    OneRow nothing(std::vector<float>(77, -kInf), 1);
    run(isa, nothing.params);
    EXPECT_EQ(nothing.sample, -1);
    OneRow skipped({1.0f, 2.0f}, 1);
    const uint8_t no = 0;
    skipped.params.select = &no;
    run(isa, skipped.params);
    EXPECT_EQ(skipped.token[0], -1);
    EXPECT_EQ(skipped.confidence[0], 0.0f);
    EXPECT_EQ(skipped.entropy, 0.0f);
  }
}

TEST(TopkConfidence, ExcludedIdsAreNoCandidates) {
  for (Isa isa : isas()) {
    OneRow row({5.0f, 9.0f, 7.0f, -kInf, 7.0f}, 4);
    row.params.exclude[0] = 1;
    row.params.num_exclude = 1;
    run(isa, row.params);
    EXPECT_EQ(row.token, (std::vector<int64_t>{2, 4, 0, 3}));
    EXPECT_NEAR(row.confidence[0], std::exp(7.0) / (std::exp(9.0) + 2 * std::exp(7.0) + std::exp(5.0)), 1e-6);
    EXPECT_EQ(row.confidence[3], 0.0f);
  }
}

TEST(TopkConfidence, RowsListAndStrides) {
  // (outer 2, inner 3) rows of 4 entries, each stored with gaps.
  std::vector<float> logits(200, 100.0f);
  for (int outer = 0; outer < 2; ++outer) {
    for (int inner = 0; inner < 3; ++inner) {
      for (int id = 0; id < 4; ++id) logits[outer * 90 + inner * 20 + id] = id == (outer * 3 + inner) % 4 ? 3.0f : 0.0f;
    }
  }
  const std::vector<int64_t> rows = {5, 0, 2, 2, 4};
  std::vector<float> confidence(5), sample_confidence(5);
  std::vector<int64_t> token(5), sample(5);
  TopkConfidenceParams params{};
  params.logits = logits.data();
  params.num_rows = 5;
  params.num_source_rows = 6;
  params.vocab = 4;
  params.inner = 3;
  params.stride_outer = 90;
  params.stride_inner = 20;
  params.rows = rows.data();
  params.k = 1;
  params.confidence = confidence.data();
  params.token = token.data();
  params.sample = sample.data();
  params.sample_confidence = sample_confidence.data();
  for (Isa isa : isas()) {
    run(isa, params);
    EXPECT_EQ(token, (std::vector<int64_t>{1, 0, 2, 2, 0}));
    for (float p : confidence) EXPECT_NEAR(p, std::exp(3.0) / (std::exp(3.0) + 3), 1e-6);
  }
}

TEST(Random, GumbelIsBoundedAndMonotone) {
  float last = unmask::kGumbelMax;
  for (uint64_t bits = 0; bits < (uint64_t{1} << 32); bits += 999983) {
    const float g = unmask::gumbel(static_cast<uint32_t>(bits));
    ASSERT_LE(g, last + 2e-6f * (1 + std::fabs(g))) << bits;
    last = g;
    const double u = unmask::uniform(static_cast<uint32_t>(bits));
    ASSERT_NEAR(g, -std::log(-std::log1p(-u)), 8e-5) << bits;  // worst just above 2^-11, where 1 - u rounds
  }
}

}  // namespace
