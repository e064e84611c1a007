// The CUDA kernel of topk_confidence, emulated: shapes, ties, layouts, samples.
#include "topk_problems.h"

namespace {

using namespace topk_problems;

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

// Of 8 places, as many as possible at all times: a row is 16 batches long.
TEST(TopkConfidence, RowsAreSplitToFillTheDevice) {
  struct Expected {
    int64_t rows;
    int resident;
    unsigned parts;
  };
  const Expected all[] = {{1, 4, 8}, {2, 4, 4}, {3, 4, 2}, {4, 4, 2}, {5, 4, 1}, {8, 4, 1}, {9, 4, 2}, {3, 2, 1}};
  for (const Expected& e : all) {
    Settings device = hopper();
    device.multiprocessors = 2;
    device.resident = e.resident;
    Device scope(device);
    Case c;
    c.vocab = 15 * 4096;
    c.inner = e.rows;
    check(Problem(c, 41));
    EXPECT_EQ(emulator::last_launch().grid.x, e.rows * e.parts) << e.rows << " rows, " << e.resident << " resident";
    EXPECT_EQ(emulator::last_launch().cluster, e.parts);
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
