// The CUDA kernel of policy_forward, emulated, against the network in float64, position by position.
#include <math.h>

#include <algorithm>
#include <limits>

#include "ops/policy_forward.h"
#include "testing.h"

namespace {

using namespace testing_tools;
using Order = Settings::Order;
using Vector = std::vector<double>;

struct Case {
  int64_t hidden = 128, heads = 2, ffn = 512, confidences = 1;
  int64_t batch = 1, length = 48;
  bool cond = false;
  int select = 0;  // 0: all (null), 1: a part, 2: none in sequence 0, 3: one position
  float gain = 1.0f;  // of the weights, on top of 1 / sqrt(inputs)
  bool nan = false;   // one confidence of the last sequence
};

struct Problem {
  Case c;
  unmask::PolicySizes sizes;
  std::vector<float> weights, confidence, time, cond;
  std::vector<uint8_t> mask, select;

  Problem(const Case& c_, uint64_t seed) : c(c_), sizes{c.hidden, c.heads, c.ffn, c.confidences} {
    std::mt19937_64 random(seed);
    std::normal_distribution<float> normal(0.0f, 1.0f);
    const int64_t d = c.hidden, f = c.ffn, k = c.confidences;
    const auto fill = [&](int64_t count, float scale, float centre = 0.0f) {
      for (int64_t i = 0; i < count; ++i) weights.push_back(centre + scale * normal(random));
    };
    const auto linear = [&](int64_t out, int64_t in) {
      fill(out * in, c.gain / sqrtf(static_cast<float>(in)));
      fill(out, 0.3f);
    };
    for (int64_t i = 0; i < d / 2; ++i) weights.push_back(0.5f + static_cast<float>(i));  // frequencies
    fill(2 * d, 1.0f);
    linear(d, d);
    linear(d, d);
    linear(d, k);
    fill(d, 0.2f, 1.0f);
    fill(d, 0.2f);
    linear(6 * d, d);
    for (int i = 0; i < 4; ++i) linear(d, d);
    fill(d, 0.2f, 1.0f);
    fill(d, 0.2f);
    linear(f, d);
    linear(d, f);
    fill(d, 0.2f, 1.0f);
    fill(d, 0.2f);
    linear(1, d);
    EXPECT_EQ(static_cast<int64_t>(weights.size()), unmask::policy_weight_count(sizes));
    std::uniform_real_distribution<float> uniform(0.0f, 1.0f);
    for (int64_t b = 0; b < c.batch; ++b) {
      time.push_back(uniform(random));
      for (int64_t i = 0; i < d && c.cond; ++i) cond.push_back(normal(random));
      for (int64_t i = 0; i < c.length; ++i) {
        mask.push_back(uniform(random) < 0.7f);
        std::vector<float> row(static_cast<size_t>(k));
        for (float& v : row) v = uniform(random);
        std::sort(row.rbegin(), row.rend());
        confidence.insert(confidence.end(), row.begin(), row.end());
        const bool wanted = c.select == 3 ? i == c.length / 2 : c.select != 2 || b != 0 ? uniform(random) < 0.4f : false;
        if (c.select) select.push_back(wanted);
      }
    }
    if (c.nan) confidence[confidence.size() - 1] = NAN;
  }
};

// Hands out the packed weights front to back.
struct Reader {
  const float* at;
  Vector operator()(int64_t count) {
    Vector v(at, at + count);
    at += count;
    return v;
  }
};
struct Linear {
  Vector w, b;
  Linear(Reader& take, int64_t out, int64_t in) : w(take(out * in)), b(take(out)) {}
  Vector operator()(const Vector& x) const {
    Vector y = b;
    for (size_t o = 0; o < y.size(); ++o)
      for (size_t i = 0; i < x.size(); ++i) y[o] += w[o * x.size() + i] * x[i];
    return y;
  }
};
struct Norm {
  Vector w, b;
  Norm(Reader& take, int64_t d) : w(take(d)), b(take(d)) {}
  Vector operator()(Vector x) const {
    double mean = 0.0, variance = 0.0;
    for (double v : x) mean += v / double(x.size());
    for (double v : x) variance += (v - mean) * (v - mean) / double(x.size());
    for (size_t i = 0; i < x.size(); ++i) x[i] = (x[i] - mean) / sqrt(variance + 1e-5) * w[i] + b[i];
    return x;
  }
};

Vector reference(const Problem& p) {
  const Case& c = p.c;
  const size_t d = size_t(c.hidden), n = size_t(c.length), heads = size_t(c.heads), size = d / heads;
  Reader take{p.weights.data()};
  const Vector frequencies = take(c.hidden / 2), embedding = take(2 * c.hidden);
  const Linear time0(take, c.hidden, c.hidden), time2(take, c.hidden, c.hidden), project(take, c.hidden, c.confidences);
  const Norm norm1(take, c.hidden);
  const Linear ada(take, 6 * c.hidden, c.hidden), q_proj(take, c.hidden, c.hidden), k_proj(take, c.hidden, c.hidden),
      v_proj(take, c.hidden, c.hidden), out_proj(take, c.hidden, c.hidden);
  const Norm norm2(take, c.hidden);
  const Linear linear1(take, c.ffn, c.hidden), linear2(take, c.hidden, c.ffn);
  const Norm final_norm(take, c.hidden);
  const Linear output(take, 1, c.hidden);

  Vector logits;
  for (int64_t b = 0; b < c.batch; ++b) {
    Vector t(d);
    for (size_t i = 0; i < d / 2; ++i) {
      t[i] = cos(double(p.time[size_t(b)]) * frequencies[i]);
      t[d / 2 + i] = sin(double(p.time[size_t(b)]) * frequencies[i]);
    }
    Vector hidden = time0(t);
    for (double& v : hidden) v = v / (1.0 + exp(-v));
    hidden = time2(hidden);
    std::vector<Vector> modulation, xs, qs, ks, vs;
    for (size_t m = 0; m < 2; ++m) {
      Vector cond = hidden;
      for (size_t i = 0; i < d; ++i) {
        cond[i] += embedding[m * d + i] + (c.cond ? double(p.cond[size_t(b) * d + i]) : 0.0);
      }
      modulation.push_back(ada(cond));
    }
    const auto part = [&](size_t i, size_t which, size_t channel) {
      return modulation[p.mask[size_t(b) * n + i]][which * d + channel];
    };
    const auto rotate = [&](Vector x, size_t position) {
      for (size_t h = 0; h < heads; ++h) {
        for (size_t pair = 0; pair < size / 2; ++pair) {
          const float frequency = float(pow(10000.0, -2.0 * double(pair) / double(size)));
          const double angle = double(position) * double(frequency);
          double& even = x[h * size + 2 * pair];
          double& odd = x[h * size + 2 * pair + 1];
          const double e = even * cos(angle) - odd * sin(angle);
          odd = even * sin(angle) + odd * cos(angle);
          even = e;
        }
      }
      return x;
    };
    for (size_t i = 0; i < n; ++i) {
      const auto from = p.confidence.begin() + (b * c.length + int64_t(i)) * c.confidences;
      xs.push_back(project(Vector(from, from + c.confidences)));
      Vector h = norm1(xs[i]);
      for (size_t j = 0; j < d; ++j) h[j] = h[j] * (1.0 + part(i, 0, j)) + part(i, 1, j);
      qs.push_back(rotate(q_proj(h), i));
      ks.push_back(rotate(k_proj(h), i));
      vs.push_back(v_proj(h));
    }
    for (size_t i = 0; i < n; ++i) {
      if (c.select && !p.select[size_t(b) * n + i]) {
        logits.push_back(-std::numeric_limits<double>::infinity());
        continue;
      }
      Vector mixed(d, 0.0);
      for (size_t h = 0; h < heads; ++h) {
        Vector score(n, 0.0);
        double top = -1e300, sum = 0.0;
        for (size_t j = 0; j < n; ++j) {
          for (size_t e = h * size; e < (h + 1) * size; ++e) score[j] += qs[i][e] * ks[j][e] / sqrt(double(size));
          top = std::max(top, score[j]);
        }
        for (double& v : score) sum += v = exp(v - top);
        for (size_t j = 0; j < n; ++j)
          for (size_t e = h * size; e < (h + 1) * size; ++e) mixed[e] += score[j] / sum * vs[j][e];
      }
      Vector x = xs[i];
      const Vector attention = out_proj(mixed);
      for (size_t j = 0; j < d; ++j) x[j] += attention[j] * (1.0 + part(i, 2, j));
      Vector h = norm2(x);
      for (size_t j = 0; j < d; ++j) h[j] = h[j] * (1.0 + part(i, 3, j)) + part(i, 4, j);
      h = linear1(h);
      for (double& v : h) v = 0.5 * v * (1.0 + erf(v * sqrt(0.5)));
      h = linear2(h);
      for (size_t j = 0; j < d; ++j) x[j] += h[j] * (1.0 + part(i, 5, j));
      logits.push_back(output(final_norm(x))[0]);
    }
  }
  return logits;
}

std::vector<float> run(const Problem& p) {
  const size_t n = size_t(p.c.batch * p.c.length);
  Buffer weights(p.weights.size() * 4), logits(n * 4);
  memcpy(weights.as<float>(), p.weights.data(), p.weights.size() * 4);
  unmask::PolicyForwardParams q = {};
  q.weights = weights.as<float>();
  q.sizes = p.sizes;
  q.batch = p.c.batch;
  q.length = p.c.length;
  q.mask = p.mask.data();
  q.confidence = p.confidence.data();
  q.time = p.time.data();
  q.cond = p.c.cond ? p.cond.data() : nullptr;
  q.select = p.c.select ? p.select.data() : nullptr;
  q.logits = logits.as<float>();
  Buffer workspace(size_t(unmask::cuda::policy_forward_workspace(q)));
  const int64_t before = emulator::launches();
  EXPECT_EQ(unmask::cuda::policy_forward(q, workspace.as<void>(), nullptr), 0);
  EXPECT_EQ(emulator::launches(), before + 1);
  return std::vector<float>(logits.as<float>(), logits.as<float>() + n);
}

// Largest difference over all logits; fails where one is not finite and the other is.
double check(const Problem& p, const Vector& expected, double tolerance = 1e-4) {
  const std::vector<float> actual = run(p);
  double worst = 0.0;
  for (size_t i = 0; i < actual.size(); ++i) {
    const double a = double(actual[i]), e = expected[i];
    if (e != e || isinf(e)) {
      EXPECT_TRUE(e != e ? a != a : a == e) << "position " << i << " is " << a << ", expected " << e;
    } else {
      EXPECT_NEAR(a, e, tolerance) << "position " << i;
      worst = std::max(worst, fabs(a - e));
    }
  }
  return worst;
}

void check(const Case& c, uint64_t seed) {
  const Problem p(c, seed);
  SCOPED_TRACE("D " + std::to_string(c.hidden) + " H " + std::to_string(c.heads) + " F " + std::to_string(c.ffn) +
               " K " + std::to_string(c.confidences) + " L " + std::to_string(c.length) + " B " +
               std::to_string(c.batch));
  check(p, reference(p));
}

// Multiprocessors decide how many blocks share a sequence.
Settings team_of(int blocks, int64_t batch, Order order, uint64_t seed = 0) {
  Settings s = hopper(order, seed);
  s.multiprocessors = blocks * int(batch);
  return s;
}

TEST(PolicyForward, PublishedSizes) {
  double worst = 0.0;
  for (int select : {0, 1}) {
    Case c;
    c.length = 256;
    c.select = select;
    const Problem p(c, 1);
    const Vector expected = reference(p);
    for (int team : {1, 2, 8}) {
      if (select == 0 && team == 2) continue;
      Device scope(team_of(team, 1, team == 2 ? Order::kRandom : Order::kForward, 3));
      worst = std::max(worst, check(p, expected, 2e-5));
    }
    Device scope(older(Order::kBackward));
    worst = std::max(worst, check(p, expected, 2e-5));
  }
  printf("worst error %.2g\n", worst);
}

TEST(PolicyForward, Lengths) {
  for (int64_t length : {1, 7, 31, 48, 100}) {
    for (int64_t confidences : {1, 8, 50}) {
      Case c;
      c.length = length;
      c.confidences = confidences;
      c.batch = 2;
      c.select = length > 2 ? 1 : 0;
      c.ffn = 48;
      c.hidden = 64;
      const Problem p(c, uint64_t(length * 100 + confidences));
      const Vector expected = reference(p);
      SCOPED_TRACE("L " + std::to_string(length) + " K " + std::to_string(confidences));
      Device scope(team_of(length % 3 == 1 ? 8 : 2, 2, length % 2 ? Order::kRandom : Order::kBackward, 5));
      check(p, expected);
    }
  }
}

TEST(PolicyForward, Sizes) {
  struct Size {
    int64_t hidden, heads, ffn, confidences;
  };
  const Size sizes[] = {{16, 1, 16, 1}, {16, 8, 16, 2},  {48, 8, 80, 3},     {64, 2, 256, 8},    {96, 4, 208, 9},
                        {128, 1, 512, 1}, {128, 64, 64, 1}, {256, 2, 1024, 1}, {256, 128, 1024, 8}, {256, 4, 1024, 64}};
  uint64_t seed = 10;
  for (const Size& size : sizes) {
    Case c;
    c.hidden = size.hidden;
    c.heads = size.heads;
    c.ffn = size.ffn;
    c.confidences = size.confidences;
    c.length = 48;
    c.select = 1;
    {
      Device scope(team_of(8, 1, Order::kRandom, ++seed));
      check(c, seed);
    }
    Device scope(older(Order::kRandom, ++seed));
    check(c, seed);
  }
}

TEST(PolicyForward, ConditionsAndSelections) {
  for (int select : {0, 1, 2, 3}) {
    Case c;
    c.batch = 3;
    c.length = 40;
    c.hidden = 32;
    c.ffn = 64;
    c.cond = select % 2 == 0;
    c.select = select;
    Device scope(team_of(4, 3, Order::kRandom, uint64_t(select)));
    check(c, 30 + uint64_t(select));
    c.batch = 1;
    check(c, 40 + uint64_t(select));
  }
}

// A multiprocessor runs one block, a cluster needs room within its span: no team so large that a sequence has to wait.
TEST(PolicyForward, TeamsOfWhichAllFitAtOnce) {
  struct Expected {
    int64_t batch;
    int multiprocessors, span;
    bool clusters;
    unsigned team;
  };
  const Expected all[] = {{1, 132, 16, true, 8}, {4, 32, 16, true, 8}, {4, 32, 14, true, 4},  {5, 32, 16, true, 4},
                          {4, 16, 3, true, 2},   {17, 32, 16, true, 1}, {4, 132, 16, false, 1}};
  for (const Expected& e : all) {
    Settings device = hopper();
    device.multiprocessors = e.multiprocessors;
    device.cluster_span = e.span;
    device.clusters = e.clusters;
    Device scope(device);
    Case c;
    c.batch = e.batch;
    c.length = 9;
    c.hidden = 32;
    c.ffn = 32;
    check(c, 80);
    EXPECT_EQ(emulator::last_launch().cluster, e.team) << "batch " << e.batch << ", span " << e.span;
  }
}

// Sharp attention: scores of a hundred and more.
TEST(PolicyForward, LargeWeights) {
  Case c;
  c.length = 64;
  c.gain = 2.5f;
  Device scope(hopper());
  check(c, 50);
  c.confidences = 20;
  check(c, 51);
}

TEST(PolicyForward, NaNStaysInItsSequence) {
  for (int64_t confidences : {1, 12}) {
    Case c;
    c.batch = 2;
    c.length = 20;
    c.hidden = 32;
    c.ffn = 32;
    c.confidences = confidences;
    c.nan = true;
    Device scope(hopper());
    check(c, 60);
  }
}

TEST(PolicyForward, EveryOrderGivesTheSameBits) {
  for (int64_t confidences : {1, 16}) {
    Case c;
    c.length = 70;
    c.hidden = 64;
    c.ffn = 128;
    c.confidences = confidences;
    const Problem p(c, 70);
    std::vector<std::vector<float>> results;
    for (uint64_t i = 0; i < 5; ++i) {
      Device scope(hopper(i == 0 ? Order::kForward : i == 1 ? Order::kBackward : Order::kRandom, i));
      results.push_back(run(p));
    }
    for (const auto& result : results) EXPECT_EQ(result, results[0]);
  }
}

TEST(PolicyForward, RefusesMisalignedWeights) {
  Case c;
  Problem p(c, 1);
  unmask::PolicyForwardParams q = {};
  q.weights = reinterpret_cast<const float*>(reinterpret_cast<uintptr_t>(p.weights.data()) / 16 * 16 + 4);
  q.sizes = p.sizes;
  q.batch = 1;
  q.length = 1;
  EXPECT_EQ(unmask::cuda::policy_forward(q, nullptr, nullptr), cudaErrorMisalignedAddress);
}

}  // namespace
