// The CUDA kernel of topk_confidence, emulated: logits of any size, and rows without a softmax.
#include "topk_problems.h"

namespace {

using namespace topk_problems;

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

// Where logits are rounded coarsely, and where the product with log2 e is: exponents must not suffer from either.
TEST(TopkConfidence, LogitsFarFromZero) {
  for (const Settings& device : {hopper(), hopper(Order::kRandom, 6), older(Order::kBackward)}) {
    Device scope(device);
    for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
      for (float offset : {1e4f, 3e4f, 5e4f, 1e6f, 3e7f, 0x1p28f, 0x1.8p29f, 0x1p30f, 3e9f, 1e20f, 3e38f}) {
        if (dtype == DType::kFloat16 && offset > 6e4f) continue;
        Case c;
        c.inner = 5;
        c.vocab = 9000;
        c.dtype = dtype;
        c.k = offset == 3e4f ? 5 : 1;
        SCOPED_TRACE("offset " + std::to_string(offset) + " dtype " + std::to_string(int(dtype)));
        Problem problem(c, 12);
        for (int64_t v = 0; v < c.vocab; ++v) {
          const float x = problem.row(0)[v];
          problem.row(0)[v] = offset + x;
          problem.row(1)[v] = -offset + x;
          problem.row(2)[v] = v % 3 ? offset + x : -offset - x;
          problem.row(3)[v] = v % 1500 ? x : -offset;                                    // far ones that do not matter
          problem.row(4)[v] = nextafterf(offset, v % 7 ? 0.0f : kInf) + (v == 5000 ? 1 : 0);  // two neighbours
        }
        check(problem);
        if (HasFailure()) return;
      }
    }
  }
}

// Every block of a row, and every batch of a thread, finds another maximum: rising, falling, in jumps above and below
// what a reference may lag behind.
TEST(TopkConfidence, MaximaThatMove) {
  for (const Settings& device : {hopper(), hopper(Order::kRandom, 7), older()}) {
    Device scope(device);
    for (int k : {1, 3}) {
      Case c;
      c.inner = 6;
      c.vocab = 40000;
      c.k = k;
      Problem problem(c, 13, 1.0f);
      for (int64_t v = 0; v < c.vocab; ++v) {
        const float part = static_cast<float>(v / 5000), batch = static_cast<float>(v / 1024);
        problem.row(0)[v] += 20.0f * part;
        problem.row(1)[v] -= 20.0f * part;
        problem.row(2)[v] += 7.5f * batch + 2e4f;
        problem.row(3)[v] += 0.2f * batch - 2e4f;
        problem.row(4)[v] = v == 39999 ? 100.0f : v % 2 ? -kInf : 7.9f;
        problem.row(5)[v] = 0.01f * static_cast<float>(v % 1000);
      }
      check(problem);
    }
  }
}

TEST(TopkConfidence, LargeLogitsOfALargeVocabulary) {
  Device scope(hopper());
  for (DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    Case c;
    c.vocab = 126464;
    c.inner = 3;
    c.dtype = dtype;
    Problem problem(c, 14, 2.0f);
    for (int64_t v = 0; v < c.vocab; ++v) {
      problem.row(0)[v] += 3e4f;
      problem.row(1)[v] -= 1e4f;
      problem.row(2)[v] *= 0.01f;  // nearly uniform: every term counts
    }
    check(problem);
  }
}

}  // namespace
