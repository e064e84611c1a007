// The CUDA kernel of topk_confidence, emulated, against a scalar float64 reference written from the contract.
#include <math.h>

#include <algorithm>
#include <limits>

#include "ops/random.h"
#include "ops/topk_confidence.h"
#include "testing.h"

namespace {

using namespace testing_tools;
using unmask::DType;
using Order = Settings::Order;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

// Rounds to the dtype's precision, by its definition; the values used here are inside float16's normal range.
uint32_t encode(float x, DType dtype) {
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

double decode(uint32_t bits, DType dtype) {
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

Expected poisoned(int k) {
  Expected e;
  e.confidence.assign(static_cast<size_t>(k), kNaN);
  e.token.assign(static_cast<size_t>(k), -1);
  return e;
}

Expected reference(const std::vector<double>& x, const Case& c, uint64_t seed, const int64_t* counter) {
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

void expect_near(double actual, double expected, double tolerance, const std::string& what) {
  if (expected != expected) {
    EXPECT_TRUE(actual != actual) << what << " is " << actual << ", expected NaN";
  } else {
    EXPECT_NEAR(actual, expected, tolerance) << what;
  }
}

// Runs the kernel on `problem` and compares everything it wrote.
void check(const Problem& problem) {
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
      const double scale = 1.0 + (e.logsumexp == e.logsumexp ? fabs(e.logsumexp) : 0.0);
      expect_near(logsumexp.as<float>()[r], e.logsumexp, 1e-6 * scale, where + "logsumexp");
      expect_near(entropy.as<float>()[r], e.entropy, 5e-6, where + "entropy");
    }
  }
}

const DType kDTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};

// Every order of threads, on both kinds of device.
std::vector<Settings> devices() {
  return {hopper(), hopper(Order::kBackward), hopper(Order::kRandom, 1), older(), older(Order::kRandom, 2)};
}

TEST(TopkConfidence, Shapes) {
  for (const Settings& device : devices()) {
    Device scope(device);
    for (int64_t vocab : {1, 2, 7, 111, 1024, 4097, 16384}) {
      for (DType dtype : kDTypes) {
        for (int k : {1, 2, 8, 64}) {
          if (k > vocab) continue;
          Case c;
          c.vocab = vocab;
          c.inner = vocab > 5000 ? 1 : 3;
          c.dtype = dtype;
          c.k = k;
          SCOPED_TRACE("V " + std::to_string(vocab) + " dtype " + std::to_string(int(dtype)) + " k " +
                       std::to_string(k));
          check(Problem(c, static_cast<uint64_t>(vocab + k)));
          if (HasFailure()) return;
        }
      }
    }
  }
}

TEST(TopkConfidence, LargeVocabularies) {
  for (const Settings& device : {hopper(Order::kRandom, 3), older()}) {
    Device scope(device);
    for (DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      for (int k : {1, 8}) {
        Case c;
        c.vocab = k == 1 ? 126464 : 32000;
        c.inner = 2;
        c.dtype = dtype;
        c.k = k;
        c.exclude = {5, c.vocab - 128};
        check(Problem(c, 5));
      }
    }
  }
}

// One block per row and more batches than cells: cells stand for groups of batches.
TEST(TopkConfidence, GroupedCells) {
  Settings device = hopper();
  device.multiprocessors = 1;
  Device scope(device);
  Case c;
  c.vocab = 17 * 4096 + 13;
  c.inner = 4;
  c.k = 8;
  c.exclude = {0, 4096, 70000 - 1};
  Problem problem(c, 6);
  check(problem);
}

TEST(TopkConfidence, MisalignedRowsAndStrides) {
  for (const Settings& device : {hopper(), older(Order::kRandom, 4)}) {
    Device scope(device);
    for (DType dtype : kDTypes) {
      for (size_t misalign = 0; misalign < 8; ++misalign) {
        Case c;
        c.outer = 2;
        c.inner = 2;
        c.vocab = misalign % 2 ? 2051 : 13;
        c.gap = 3;
        c.outer_gap = 5;
        c.misalign = misalign;
        c.dtype = dtype;
        c.k = misalign % 3 ? 3 : 1;
        c.temperature = misalign % 4 == 1 ? 0.7f : 0.0f;
        SCOPED_TRACE("misalign " + std::to_string(misalign));
        check(Problem(c, misalign));
      }
    }
  }
}

TEST(TopkConfidence, TiesGoToTheLowestId) {
  for (const Settings& device : {hopper(), hopper(Order::kRandom, 5), older(Order::kBackward)}) {
    Device scope(device);
    for (int k : {1, 8, 64}) {
      Case c;
      c.inner = 4;
      c.vocab = 8200;
      c.dtype = k == 8 ? DType::kFloat16 : DType::kBFloat16;
      c.k = k;
      c.exclude = {0, 3};
      Problem problem(c);
      std::mt19937 random(7);
      for (int64_t v = 0; v < c.vocab; ++v) {
        problem.row(0)[v] = 1.0f;                                      // all equal
        problem.row(1)[v] = static_cast<float>(random() % 3);          // a few values
        problem.row(2)[v] = static_cast<float>(v / 512);               // ascending in steps
        problem.row(3)[v] = random() % 2 ? 0.0f : -0.0f;               // zeros of both signs are equal
      }
      check(problem);
    }
  }
}

// Everything the selection can be handed: the k best in one thread, ascending, descending, in one place.
TEST(TopkConfidence, AdversarialOrders) {
  for (const Settings& device : {hopper(), older()}) {
    Device scope(device);
    for (DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      Case c;
      c.inner = 4;
      c.vocab = 20000;
      c.k = 64;
      c.dtype = dtype;
      Problem problem(c);
      for (int64_t v = 0; v < c.vocab; ++v) {
        problem.row(0)[v] = static_cast<float>(v) * 1e-3f;
        problem.row(1)[v] = static_cast<float>(-v) * 1e-3f;
        problem.row(2)[v] = static_cast<float>(v % 1024 < 8 ? v % 64 : -5);  // one thread's vectors
        problem.row(3)[v] = static_cast<float>(v / 2048 % 2 ? v % 97 : v % 89) * 0.25f;
      }
      check(problem);
    }
  }
}

TEST(TopkConfidence, PoisonedAndDegenerateRows) {
  for (const Settings& device : {hopper(), hopper(Order::kRandom, 8), older(Order::kRandom, 9)}) {
    Device scope(device);
    for (int k : {1, 5}) {
      for (float temperature : {0.0f, 1.0f}) {
        Case c;
        c.inner = 9;
        c.vocab = 9000;
        c.k = k;
        c.temperature = temperature;
        c.exclude = {17, 8999};
        Problem problem(c, 9);
        const auto fill = [&](int64_t r, float value) { std::fill_n(problem.row(r), c.vocab, value); };
        problem.row(0)[8998] = NAN;
        problem.row(1)[0] = kInf;
        fill(2, -kInf);
        fill(3, -kInf);
        problem.row(3)[17] = 1.0f;  // the only finite one is excluded: the candidates all have p = 0
        fill(4, -kInf);
        problem.row(4)[6000] = -3.0f;
        problem.row(4)[40] = -3.0f;
        fill(5, std::numeric_limits<float>::lowest());
        fill(6, std::numeric_limits<float>::lowest());
        problem.row(6)[123] = 1e38f;
        problem.row(7)[4000] = -kInf;
        problem.row(8)[17] = 100.0f;  // excluded, but in the denominator
        check(problem);
      }
    }
  }
}

TEST(TopkConfidence, RowsAndSelect) {
  for (const Settings& device : {hopper(), older()}) {
    Device scope(device);
    for (int k : {1, 4}) {
      Case c;
      c.outer = 3;
      c.inner = 5;
      c.outer_gap = 2;
      c.vocab = 2000;
      c.k = k;
      c.temperature = k == 1 ? 1.0f : 0.0f;
      c.counter = false;
      c.rows = {14, 0, 7, 7, -1, 15, int64_t{1} << 40, 3};
      check(Problem(c, 10));
      c.rows.clear();
      c.select = {1, 0, 0, 1, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 2};
      check(Problem(c, 11));
      c.select.assign(15, 0);
      check(Problem(c, 11));
    }
  }
}

TEST(TopkConfidence, SamplesAreTheScalarDefinition) {
  for (const Settings& device : {hopper(), hopper(Order::kRandom, 12), older(Order::kBackward)}) {
    Device scope(device);
    uint64_t seed = 20;
    for (float temperature : {0.05f, 0.7f, 1.0f, 3.0f, 1e4f}) {
      for (DType dtype : kDTypes) {
        Case c;
        c.inner = 2;
        c.vocab = temperature == 1.0f ? 9001 : 1500;
        c.dtype = dtype;
        c.k = temperature == 0.7f ? 8 : 1;
        c.temperature = temperature;
        c.counter = temperature < 1.0f;
        c.exclude = {2, 777};
        c.misalign = seed % 5;
        check(Problem(c, ++seed, temperature == 3.0f ? 0.0f : 4.0f));
      }
    }
  }
}

// Logits far from zero, where a score is rounded coarsely and ties are many.
TEST(TopkConfidence, SamplesAmongLargeLogits) {
  Device scope(hopper());
  for (float offset : {1e4f, -3e6f}) {
    Case c;
    c.vocab = 3000;
    c.inner = 3;
    c.temperature = 0.5f;
    Problem problem(c, 30, 3.0f);
    for (float& v : problem.values) v += offset;
    check(problem);
  }
}

TEST(TopkConfidence, OneLaunchWhateverTheSize) {
  for (const Settings& device : {hopper(), older()}) {
    Device scope(device);
    Case c;
    c.vocab = 20000;
    c.inner = 1;
    const int64_t before = emulator::launches();
    check(Problem(c, 40));
    EXPECT_EQ(emulator::launches(), before + 1);
  }
}

}  // namespace
