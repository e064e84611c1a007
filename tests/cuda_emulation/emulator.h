// CUDA's execution model on the CPU, as far as the kernels in csrc/cuda use it (see csrc/cuda/portable.cuh).
//
// Every CUDA thread is a fiber. All blocks of a cluster are alive together and clusters run one after the other, in
// an order that can be shuffled; so can the order in which the threads of a cluster get to run between two points
// of waiting. A kernel whose result depends on that order has a race. What else is a mistake on a GPU ends the
// process with a message: a barrier or shuffle that not every thread reaches, a peer's shared memory touched before the
// cluster has started or after the peer has gone. Shared memory starts as garbage and has its exact size, so the address
// sanitizer sees every access outside it; asynchronous copies land when they are waited for and not before.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <cstddef>
#include <functional>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __grid_constant__
#define __align__(n) alignas(n)
#define __launch_bounds__(...)
#define __syncthreads() ::emulator::block_barrier(__LINE__)
#define __syncwarp() ::emulator::warp_barrier(__LINE__)
#define __shfl_xor_sync(mask, value, offset) \
  ::emulator::shuffle(mask, value, ::emulator::self().lane() ^ static_cast<unsigned>(offset), __LINE__)
#define __shfl_sync(mask, value, lane) ::emulator::shuffle(mask, value, static_cast<unsigned>(lane), __LINE__)
#define threadIdx ::emulator::self().thread_index
#define blockIdx ::emulator::self().block_index()
#define blockDim ::emulator::self().block_size()
#define gridDim ::emulator::self().grid_size()
#define UNMASK_DEVICE inline
#define UNMASK_DEVICE_COLD inline

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return float4{x, y, z, w}; }

using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
constexpr cudaError_t cudaErrorInvalidValue = 1;
constexpr cudaError_t cudaErrorMisalignedAddress = 716;
using cudaStream_t = void*;
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  memset(p, value, bytes);
  return cudaSuccess;
}

namespace emulator {

struct Block;

// One CUDA thread.
struct Thread {
  uint3 thread_index;
  Block* block;
  unsigned lane() const { return thread_index.x % 32; }
  const uint3& block_index() const;
  const dim3& block_size() const;
  const dim3& grid_size() const;
};

// What the emulated device and its scheduler are like; tests set it.
struct Settings {
  int multiprocessors = 132;
  int shared_bytes = 227 * 1024;
  bool clusters = true;
  int resident = 4;       // blocks a multiprocessor runs at once
  int cluster_span = 16;  // multiprocessors that a cluster may spread over, one block on each
  enum class Order { kForward, kBackward, kRandom } order = Order::kForward;
  uint64_t order_seed = 0;
};
Settings& settings();

struct Launch {
  dim3 grid;
  unsigned threads;
  unsigned cluster;
  size_t shared_bytes;
};
// Runs `body` once per thread. Returns when all are done.
void run(const Launch& launch, const std::function<void()>& body);
// Launches so far, for tests that count them, and the last one.
int64_t launches();
const Launch& last_launch();

Thread& self();
void block_barrier(int line);
void warp_barrier(int line);
// What `lane` passed in; `line` must be the same in all 32 lanes.
uint64_t exchange(unsigned mask, uint64_t value, unsigned lane, int line);
void yield();
unsigned char* shared_memory();
unsigned cluster_rank();
void cluster_arrive();
void cluster_wait();
void* cluster_map(void* p, unsigned rank);
void copy_async(void* to, const void* from);
void commit_copies();
void wait_copies(int newest);

template <typename T>
T shuffle(unsigned mask, T value, unsigned lane, int line) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value, "one register or two");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = exchange(mask, bits, lane & 31, line);
  memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace emulator

template <typename T>
T atomicAdd(T* p, T value) {
  emulator::yield();
  const T old = *p;
  *p = static_cast<T>(old + value);
  return old;
}
inline int atomicMin(int* p, int value) {
  emulator::yield();
  const int old = *p;
  if (value < old) *p = value;
  return old;
}
inline void __threadfence() {}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  unsigned result = 0;
  // One exchange carries one lane's bit to all: 32 of them make a ballot. Simple, and ballots are rare.
  for (unsigned lane = 0; lane < 32; ++lane) {
    result |= static_cast<unsigned>(emulator::exchange(mask, predicate ? 1 : 0, lane, -1)) << lane;
  }
  return result;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clzll(long long x) { return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
template <typename T>
T __ldg(const T* p) {
  return *p;
}
inline void sincospif(float x, float* sine, float* cosine) {
  *sine = static_cast<float>(sin(M_PI * static_cast<double>(x)));
  *cosine = static_cast<float>(cos(M_PI * static_cast<double>(x)));
}

namespace unmask {
namespace cuda {

struct DeviceInfo;
struct LaunchShape;

template <typename Info>
cudaError_t query_device(Info* info) {
  info->multiprocessors = emulator::settings().multiprocessors;
  info->shared_bytes = emulator::settings().shared_bytes;
  info->clusters = emulator::settings().clusters;
  return cudaSuccess;
}

template <typename Shape, typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const Shape& shape, const Arguments&... arguments) {
  const emulator::Settings& device = emulator::settings();
  const bool bad = shape.threads == 0 || shape.threads > 1024 || shape.grid_x == 0 || shape.grid_y == 0 ||
                   shape.grid_y > 65535 || shape.cluster == 0 || shape.cluster > 8 ||
                   shape.grid_x % shape.cluster != 0 || (shape.cluster > 1 && !device.clusters) ||
                   shape.shared_bytes > device.shared_bytes;
  if (bad) return cudaErrorInvalidValue;
  const emulator::Launch launch{
      {shape.grid_x, shape.grid_y, 1}, shape.threads, shape.cluster, static_cast<size_t>(shape.shared_bytes)};
  emulator::run(launch, [&] { kernel(arguments...); });
  return cudaSuccess;
}

template <typename Kernel, typename Shape>
int resident_blocks(Kernel, const Shape& shape) {
  const emulator::Settings& device = emulator::settings();
  if (shape.cluster == 1) return device.multiprocessors * device.resident;
  const int size = static_cast<int>(shape.cluster), span = device.cluster_span, rest = device.multiprocessors % span;
  const int clusters = device.multiprocessors / span * (span / size) + rest / size;
  return clusters > 0 ? clusters * size : 1;
}

inline unsigned char* dynamic_shared() { return emulator::shared_memory(); }
inline float exp2_fast(float x) {
  const float y = exp2f(x);
  return y < 1.17549435e-38f ? 0.0f : y;  // ftz; NaN passes
}
inline float half_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  float x = exponent == 31 ? (mantissa ? NAN : INFINITY)
                           : ldexpf(static_cast<float>(exponent ? mantissa + 1024 : mantissa),
                                    (exponent ? exponent : 1) - 25);
  return bits & 0x8000 ? -x : x;
}
inline uint4 load_streaming(const void* p) {
  return *static_cast<const uint4*>(p);  // typed, so that the sanitizer sees a misaligned address
}
inline void copy_async(void* shared, const void* global) { emulator::copy_async(shared, global); }
inline void commit_copies() { emulator::commit_copies(); }
template <int kNewest>
void wait_copies() {
  emulator::wait_copies(kNewest);
}
inline void prefetch_l2(const void*) {}
inline unsigned cluster_rank() { return emulator::cluster_rank(); }
inline void cluster_arrive() { emulator::cluster_arrive(); }
inline void cluster_arrive_relaxed() { emulator::cluster_arrive(); }
inline void cluster_wait() { emulator::cluster_wait(); }
template <typename T>
T* cluster_map(T* p, unsigned rank) {
  return static_cast<T*>(emulator::cluster_map(const_cast<typename std::remove_const<T>::type*>(p), rank));
}

}  // namespace cuda
}  // namespace unmask
