// Shared by the tests of the emulated kernels: schedules to try, buffers of exact size, small random numbers.
#pragma once
#include <gtest/gtest.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <memory>
#include <random>
#include <string>
#include <vector>

#include "emulator.h"

namespace testing_tools {

using emulator::Settings;

// Sets the emulated device and schedule for one scope.
class Device {
 public:
  explicit Device(Settings settings) : old_(emulator::settings()) { emulator::settings() = settings; }
  ~Device() { emulator::settings() = old_; }

 private:
  Settings old_;
};

inline Settings hopper(Settings::Order order = Settings::Order::kForward, uint64_t seed = 0) {
  Settings s;
  s.order = order;
  s.order_seed = seed;
  return s;
}

// No clusters, less shared memory, fewer multiprocessors: an older card.
inline Settings older(Settings::Order order = Settings::Order::kForward, uint64_t seed = 0) {
  Settings s = hopper(order, seed);
  s.clusters = false;
  s.multiprocessors = 40;
  s.shared_bytes = 99 * 1024;
  return s;
}

// Storage of exactly `bytes` that starts `misalign` bytes after a 256-byte boundary, filled with garbage.
class Buffer {
 public:
  explicit Buffer(size_t bytes, size_t misalign = 0, int garbage = 0xff) : bytes_(bytes) {
    void* p = nullptr;
    if (posix_memalign(&p, 256, bytes + misalign + 1)) abort();
    storage_.reset(static_cast<unsigned char*>(p));
    data_ = storage_.get() + misalign;
    memset(storage_.get(), garbage, bytes + misalign + 1);
  }
  template <typename T>
  T* as() {
    return reinterpret_cast<T*>(data_);
  }
  size_t bytes() const { return bytes_; }

 private:
  struct Free {
    void operator()(unsigned char* p) const { free(p); }
  };
  std::unique_ptr<unsigned char, Free> storage_;
  unsigned char* data_;
  size_t bytes_;
};

}  // namespace testing_tools
