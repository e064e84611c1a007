// The emulator itself: what it must get right, and the mistakes it must not let pass.
#include <algorithm>

#include "testing.h"

namespace {

using namespace testing_tools;
using Order = Settings::Order;

emulator::Launch shape(unsigned blocks, unsigned threads, unsigned cluster = 1, size_t shared = 1024) {
  return emulator::Launch{{blocks, 1, 1}, threads, cluster, shared};
}

TEST(Emulator, BarriersAndSharedMemory) {
  for (Order order : {Order::kForward, Order::kBackward, Order::kRandom}) {
    Device scope(hopper(order, 3));
    std::vector<int> out(3 * 64, -1);
    emulator::run(shape(3, 64), [&] {
      int* shared = reinterpret_cast<int*>(emulator::shared_memory());
      const int t = static_cast<int>(threadIdx.x);
      shared[t] = t + 100 * static_cast<int>(blockIdx.x);
      __syncthreads();
      out[blockIdx.x * 64 + threadIdx.x] = shared[63 - t];
    });
    for (int b = 0; b < 3; ++b)
      for (int t = 0; t < 64; ++t) EXPECT_EQ(out[size_t(b * 64 + t)], 63 - t + 100 * b);
  }
}

TEST(Emulator, Shuffles) {
  for (Order order : {Order::kForward, Order::kBackward, Order::kRandom}) {
    Device scope(hopper(order, 4));
    std::vector<double> sums(64);
    std::vector<unsigned> ballots(64);
    emulator::run(shape(1, 64), [&] {
      double x = threadIdx.x;
      for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
      sums[threadIdx.x] = x;
      ballots[threadIdx.x] = __ballot_sync(0xffffffffu, threadIdx.x % 3 == 0);
    });
    for (unsigned t = 0; t < 64; ++t) {
      EXPECT_EQ(sums[t], t < 32 ? 496.0 : 496.0 + 32 * 32);
      unsigned expected = 0;
      for (unsigned lane = 0; lane < 32; ++lane) expected |= (t / 32 * 32 + lane) % 3 == 0 ? 1u << lane : 0;
      EXPECT_EQ(ballots[t], expected);
    }
  }
}

TEST(Emulator, ClustersShareMemory) {
  Device scope(hopper(Order::kRandom, 5));
  std::vector<int> out(8);
  emulator::run(shape(8, 32, 4), [&] {
    int* shared = reinterpret_cast<int*>(emulator::shared_memory());
    const unsigned rank = emulator::cluster_rank();
    if (threadIdx.x == 0) shared[0] = static_cast<int>(blockIdx.x * 10);
    emulator::cluster_arrive();
    emulator::cluster_wait();
    if (threadIdx.x == 0) out[blockIdx.x] = *unmask::cuda::cluster_map(shared, (rank + 1) % 4);
    emulator::cluster_arrive();
    emulator::cluster_wait();
  });
  EXPECT_EQ(out, (std::vector<int>{10, 20, 30, 0, 50, 60, 70, 40}));
}

TEST(Emulator, CopiesLandWhenWaitedFor) {
  alignas(16) float from[4] = {1, 2, 3, 4};
  float before = 0.0f, after = 0.0f;
  emulator::run(shape(1, 1), [&] {
    float* shared = reinterpret_cast<float*>(emulator::shared_memory());
    emulator::copy_async(shared, from);
    emulator::commit_copies();
    emulator::wait_copies(1);
    before = shared[2];
    emulator::wait_copies(0);
    after = shared[2];
  });
  EXPECT_TRUE(before != before);
  EXPECT_EQ(after, 3.0f);
}

// A missing barrier shows as a result that depends on the order.
TEST(Emulator, OrderExposesRaces) {
  std::vector<int> seen;
  for (Order order : {Order::kForward, Order::kBackward}) {
    Device scope(hopper(order));
    int result = 0;
    emulator::run(shape(1, 32), [&] { result = static_cast<int>(threadIdx.x); });
    seen.push_back(result);
  }
  EXPECT_NE(seen[0], seen[1]);
}

using EmulatorDeathTest = ::testing::Test;

TEST(EmulatorDeathTest, DivergentBarrier) {
  ::testing::FLAGS_gtest_death_test_style = "threadsafe";
  EXPECT_DEATH(emulator::run(shape(1, 64), [] { if (threadIdx.x < 32) __syncthreads(); }), "barrier");
}

TEST(EmulatorDeathTest, ShuffleWithoutTheWholeWarp) {
  ::testing::FLAGS_gtest_death_test_style = "threadsafe";
  EXPECT_DEATH(emulator::run(shape(1, 32), [] { if (threadIdx.x < 8) __shfl_sync(0xffffffffu, 1, 0); }), "warp");
}

TEST(EmulatorDeathTest, PeerBeforeTheClusterStarted) {
  ::testing::FLAGS_gtest_death_test_style = "threadsafe";
  EXPECT_DEATH(emulator::run(shape(2, 32, 2), [] { emulator::cluster_map(emulator::shared_memory(), 1 - emulator::cluster_rank()); }),
               "before the cluster's first barrier");
}

TEST(EmulatorDeathTest, PeerThatHasEnded) {
  ::testing::FLAGS_gtest_death_test_style = "threadsafe";
  EXPECT_DEATH(emulator::run(shape(2, 32, 2),
                             [] {
                               emulator::cluster_arrive();
                               emulator::cluster_wait();
                               if (emulator::cluster_rank() == 1) return;
                               emulator::cluster_arrive();
                               emulator::cluster_wait();
                               emulator::cluster_map(emulator::shared_memory(), 1);
                             }),
               "ended");
}

}  // namespace
