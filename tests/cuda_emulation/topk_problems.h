// Problems for the emulated kernel of topk_confidence, and a scalar float64 reference written from the contract.
#pragma once
#include <math.h>

#include <algorithm>
#include <limits>

#include "ops/random.h"
#include "ops/topk_confidence.h"
#include "testing.h"

namespace topk_problems {

using namespace testing_tools;
using unmask::DType;
using Order = Settings::Order;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

// Rounds to the dtype's precision, by its definition; the values used here are inside float16's normal range.
inline uint32_t encode(float x, DType dtype) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (dtype == DType::kFloat32) return bits;
  if (dtype == DType::kBFloat16) {
    if (x != x) return 0x7fc0;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  }
  const uint32_t sign = bits >> 16 & 0x8000;
  if (x != x) return 0x7e00;
  if (isinf(x)) return sign | 0x7c00;
  int exponent = 0;
  const float fraction = frexpf(fabsf(x), &exponent);  // [0.5, 1)
  if (x == 0.0f || exponent < -13) return sign;
  const uint32_t mantissa = static_cast<uint32_t>(nearbyintf(ldexpf(fraction, 11)));
  return sign | (static_cast<uint32_t>(exponent + 13) * 1024 + mantissa);
}

inline double decode(uint32_t bits, DType dtype) {
  if (dtype == DType::kFloat16) {
    const int exponent = static_cast<int>(bits >> 10 & 31), mantissa = static_cast<int>(bits & 1023);
    double x = exponent == 0 ? ldexp(mantissa, -24) : ldexp(1024 + mantissa, exponent - 25);
    if (exponent == 31) x = mantissa ? kNaN : kInf;
    return bits & 0x8000 ? -x : x;
  }
  if (dtype == DType::kBFloat16) bits <<= 16;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

struct Case {
  int64_t outer = 1, inner = 2, vocab = 100;
  int64_t gap = 0;         // elements between rows
  int64_t outer_gap = 0;   // more of them between groups of rows
  size_t misalign = 0;     // of the first row, in elements
  DType dtype = DType::kFloat32;
  int k = 1;
  std::vector<int64_t> exclude;
  float temperature = 0.0f;
  bool counter = true;
  bool statistics = true;
  std::vector<int64_t> rows;
  std::vector<uint8_t> select;
};

struct Expected {
  std::vector<double> confidence;
  std::vector<int64_t> token;
  int64_t sample = -1;
  double sample_confidence = kNaN, logsumexp = kNaN, entropy = kNaN;
};

inline Expected poisoned(int k) {
  Expected e;
  e.confidence.assign(static_cast<size_t>(k), kNaN);
  e.token.assign(static_cast<size_t>(k), -1);
  return e;
}

inline Expected reference(const std::vector<double>& x, const Case& c, uint64_t seed, const int64_t* counter) {
  const size_t k = static_cast<size_t>(c.k);
  double top = -kInf;
  for (double v : x) {
    if (v != v || v == kInf) return poisoned(c.k);
    top = std::max(top, v);
  }
  if (top == -kInf) return poisoned(c.k);
  double sum = 0.0, weighted = 0.0;
  for (double v : x) {
    sum += exp(v - top);
    if (v > -kInf) weighted += exp(v - top) * (v - top);
  }
  Expected e;
  e.logsumexp = top + log(sum);
  e.entropy = log(sum) - weighted / sum;
  std::vector<int64_t> ids;
  for (int64_t id = 0; id < c.vocab; ++id)
    if (std::find(c.exclude.begin(), c.exclude.end(), id) == c.exclude.end()) ids.push_back(id);
  std::stable_sort(ids.begin(), ids.end(), [&x](int64_t a, int64_t b) { return x[size_t(a)] > x[size_t(b)]; });
  for (size_t n = 0; n < k; ++n) {
    e.token.push_back(ids[n]);
    e.confidence.push_back(exp(x[size_t(ids[n])] - top) / sum);
  }
  e.sample = ids[0];
  if (c.temperature > 0.0f) {
    const float inverse = 1.0f / c.temperature;
    float best = -kInf;
    e.sample = -1;
    std::sort(ids.begin(), ids.end());
    for (int64_t id : ids) {
      const unmask::Philox4 drawn =
          unmask::philox4x32(seed, static_cast<uint32_t>(id / 4), static_cast<uint32_t>(counter[1]),
                             static_cast<uint32_t>(counter[2]), static_cast<uint32_t>(counter[0]));
      const float score = fmaf(static_cast<float>(x[size_t(id)]), inverse, unmask::gumbel(drawn.word[id % 4]));
      if (e.sample < 0 || score > best) {
        best = score;
        e.sample = id;
      }
    }
  }
  e.sample_confidence = exp(x[size_t(e.sample)] - top) / sum;
  return e;
}

struct Problem {
  Case c;
  std::vector<float> values;  // (outer, inner, vocab) before rounding
  int64_t seed = 0x123456789abcdef;

  explicit Problem(const Case& c_, uint64_t seed_ = 1, float spread = 4.0f) : c(c_) {
    std::mt19937_64 random(seed_);
    std::normal_distribution<float> normal(0.0f, spread);
    values.resize(static_cast<size_t>(c.outer * c.inner * c.vocab));
    for (float& v : values) v = normal(random);
  }
  float* row(int64_t r) { return values.data() + r * c.vocab; }
};

inline void expect_near(double actual, double expected, double tolerance, const std::string& what) {
  if (expected != expected) {
    EXPECT_TRUE(actual != actual) << what << " is " << actual << ", expected NaN";
  } else {
    EXPECT_NEAR(actual, expected, tolerance) << what;
  }
}

// Runs the kernel on `problem` and compares everything it wrote.
inline void check(const Problem& problem) {
  const Case& c = problem.c;
  const int64_t sources = c.outer * c.inner, count = c.rows.empty() ? sources : static_cast<int64_t>(c.rows.size());
  const size_t size = c.dtype == DType::kFloat32 ? 4 : 2;
  const int64_t stride = c.vocab + c.gap, outer_stride = c.inner * stride + c.outer_gap;
  // Ends with the last row's last element, so that the sanitizer sees any read past it.
  const size_t elements = static_cast<size_t>((c.outer - 1) * outer_stride + (c.inner - 1) * stride + c.vocab);
  Buffer logits(elements * size, c.misalign * size);
  std::vector<double> exact(problem.values.size());
  for (int64_t r = 0; r < sources; ++r) {
    for (int64_t v = 0; v < c.vocab; ++v) {
      const size_t at = static_cast<size_t>(r / c.inner * outer_stride + r % c.inner * stride + v);
      const uint32_t bits = encode(problem.values[size_t(r * c.vocab + v)], c.dtype);
      if (size == 4) {
        logits.as<uint32_t>()[at] = bits;
      } else {
        logits.as<uint16_t>()[at] = static_cast<uint16_t>(bits);
      }
      exact[size_t(r * c.vocab + v)] = decode(bits, c.dtype);
    }
  }
  std::vector<int64_t> counter(static_cast<size_t>(3 * count));
  for (size_t i = 0; i < counter.size(); ++i) counter[i] = static_cast<int64_t>(i * i + 7);
  const size_t n = static_cast<size_t>(count), k = static_cast<size_t>(c.k);
  Buffer confidence(n * k * 4), token(n * k * 8), sample(n * 8), sample_confidence(n * 4), logsumexp(n * 4),
      entropy(n * 4);

  unmask::TopkConfidenceParams p = {};
  p.logits = logits.as<void>();
  p.dtype = c.dtype;
  p.num_rows = count;
  p.vocab = c.vocab;
  p.inner = c.inner;
  p.stride_outer = outer_stride;
  p.stride_inner = stride;
  p.rows = c.rows.empty() ? nullptr : c.rows.data();
  p.num_source_rows = sources;
  p.select = c.select.empty() ? nullptr : c.select.data();
  p.k = c.k;
  std::copy(c.exclude.begin(), c.exclude.end(), p.exclude);
  p.num_exclude = static_cast<int>(c.exclude.size());
  p.inverse_temperature = c.temperature > 0.0f ? 1.0f / c.temperature : 0.0f;
  p.seed = c.temperature > 0.0f ? &problem.seed : nullptr;
  p.counter = c.counter && c.temperature > 0.0f ? counter.data() : nullptr;
  p.confidence = confidence.as<float>();
  p.token = token.as<int64_t>();
  p.sample = sample.as<int64_t>();
  p.sample_confidence = sample_confidence.as<float>();
  p.logsumexp = c.statistics ? logsumexp.as<float>() : nullptr;
  p.entropy = c.statistics ? entropy.as<float>() : nullptr;
  Buffer workspace(static_cast<size_t>(unmask::cuda::topk_confidence_workspace(p)));
  ASSERT_EQ(unmask::cuda::topk_confidence(p, workspace.as<void>(), nullptr), 0);

  for (int64_t r = 0; r < count; ++r) {
    const std::string where = "row " + std::to_string(r) + " ";
    const int64_t source = c.rows.empty() ? r : c.rows[size_t(r)];
    const bool inside = source >= 0 && source < sources;
    Expected e = poisoned(c.k);
    const int64_t plain[3] = {0, source, 0};
    if (!c.select.empty() && !c.select[size_t(r)]) {
      e.confidence.assign(k, 0.0);
      e.sample_confidence = e.logsumexp = e.entropy = 0.0;
    } else if (inside) {
      const std::vector<double> x(exact.begin() + source * c.vocab, exact.begin() + (source + 1) * c.vocab);
      e = reference(x, c, static_cast<uint64_t>(problem.seed), p.counter ? &counter[size_t(3 * r)] : plain);
    }
    for (size_t j = 0; j < k; ++j) {
      EXPECT_EQ(token.as<int64_t>()[size_t(r) * k + j], e.token[j]) << where << "token " << j;
      expect_near(confidence.as<float>()[size_t(r) * k + j], e.confidence[j], 1e-6, where + "confidence");
    }
    EXPECT_EQ(sample.as<int64_t>()[r], e.sample) << where << "sample";
    expect_near(sample_confidence.as<float>()[r], e.sample_confidence, 1e-6, where + "sample_confidence");
    if (c.statistics) {
      const float size = fabsf(static_cast<float>(e.logsumexp));
      const double spacing = size == size ? static_cast<double>(nextafterf(size, kInf) - size) : 0.0;
      expect_near(logsumexp.as<float>()[r], e.logsumexp, 2e-6 + 0.51 * spacing, where + "logsumexp");
      expect_near(entropy.as<float>()[r], e.entropy, 5e-6, where + "entropy");
    }
  }
}

}  // namespace topk_problems
