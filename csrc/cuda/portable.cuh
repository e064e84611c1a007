// What every kernel here needs from the device, in one place: launches (with clusters where the device has them), a
// block's dynamic shared memory, cluster barriers and peers' shared memory, asynchronous copies, special loads.
#pragma once
#include <cuda_runtime.h>
#include <stdint.h>

#include <atomic>
#include <map>
#include <mutex>
#include <random>
#include <tuple>

#define UNMASK_DEVICE __device__ __forceinline__
#define UNMASK_DEVICE_COLD __device__ __noinline__

namespace unmask::cuda {

constexpr unsigned kFullWarp = 0xffffffffu;

// The device a launch goes to.
struct DeviceInfo {
  int multiprocessors;
  int shared_bytes;  // most dynamic shared memory of a block
  bool clusters;     // clusters and dependent launches: the device has them, and so has the code that runs on it
};

struct LaunchShape {
  unsigned blocks;
  unsigned threads;
  int shared_bytes;
  void* stream;
  unsigned cluster = 1;      // blocks of a cluster; 1 = none
  bool dependent = false;    // may start before what is in front of it has ended; it calls wait_for_launches()
  bool cooperative = false;  // all blocks are on the device together, or it fails
};

// The architecture whose code runs on a device of this one (900 = compute capability 9.0): the newest up to it that was
// compiled. Code of an older one, translated for the device, has no clusters, though the device has.
inline int loaded_arch(int device) {
  int loaded = 0;
  for (const int arch : {__CUDA_ARCH_LIST__}) loaded = arch <= device && arch > loaded ? arch : loaded;
  return loaded;
}

inline cudaError_t query_device(DeviceInfo* info) {
  int device = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&device);
  const auto ask = [&](cudaDeviceAttr attribute, int* value) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, device);
  };
  ask(cudaDevAttrMultiProcessorCount, &info->multiprocessors);
  ask(cudaDevAttrMaxSharedMemoryPerBlockOptin, &info->shared_bytes);
  ask(cudaDevAttrComputeCapabilityMajor, &major);
  ask(cudaDevAttrComputeCapabilityMinor, &minor);
  info->clusters = loaded_arch(100 * major + 10 * minor) >= 900;
  return error;
}

// Lets launches of the kernel have `bytes` of dynamic shared memory: by allowing all there is, since another thread may
// set the same attribute between this and the launch.
template <typename... Parameters>
cudaError_t allow_shared(void (*kernel)(Parameters...), int bytes) {
  if (bytes <= 48 * 1024) return cudaSuccess;
  DeviceInfo device;
  const cudaError_t error = query_device(&device);
  if (error != cudaSuccess) return error;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_bytes);
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const LaunchShape& shape, const Arguments&... arguments) {
  const cudaError_t error = allow_shared(kernel, shape.shared_bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attributes[3] = {};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(shape.blocks);
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = static_cast<cudaStream_t>(shape.stream);
  config.attrs = attributes;
  const auto attribute = [&](cudaLaunchAttributeID id) -> cudaLaunchAttributeValue& {
    attributes[config.numAttrs].id = id;
    return attributes[config.numAttrs++].val;
  };
  if (shape.cluster > 1) attribute(cudaLaunchAttributeClusterDimension).clusterDim = {shape.cluster, 1, 1};
  if (shape.dependent) {
    attribute(cudaLaunchAttributeProgrammaticStreamSerialization).programmaticStreamSerializationAllowed = 1;
  }
  if (shape.cooperative) attribute(cudaLaunchAttributeCooperative).cooperative = 1;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// Launches `blocks` blocks that may start early and call wait_for_launches(), with `bytes` of dynamic shared memory each.
template <typename Params>
cudaError_t launch_blocks(void (*kernel)(Params), int64_t blocks, unsigned threads, int64_t bytes, void* stream,
                          const Params& params) {
  if (blocks == 0) return cudaSuccess;
  DeviceInfo device;
  const cudaError_t error = query_device(&device);
  if (error != cudaSuccess) return error;
  if (bytes > device.shared_bytes || blocks > INT32_MAX) return cudaErrorInvalidValue;
  return launch(kernel, {static_cast<unsigned>(blocks), threads, static_cast<int>(bytes), stream, 1, device.clusters},
                params);
}

// How many blocks of such a launch, without clusters, the current device runs at once; at least one. Asking takes
// microseconds, so answers are kept.
template <typename... Parameters>
int resident_blocks(void (*kernel)(Parameters...), const LaunchShape& shape) {
  using Key = std::tuple<int, const void*, unsigned, int>;
  static std::mutex mutex;
  static std::map<Key, int> known;
  int number = 0;
  DeviceInfo device;
  if (cudaGetDevice(&number) != cudaSuccess || query_device(&device) != cudaSuccess) return 1;
  const std::lock_guard<std::mutex> lock(mutex);
  int& blocks = known[Key(number, reinterpret_cast<const void*>(kernel), shape.threads, shape.shared_bytes)];  // of one
  const int threads = static_cast<int>(shape.threads);
  const auto bytes = static_cast<size_t>(shape.shared_bytes);
  if (blocks == 0 &&
      (allow_shared(kernel, shape.shared_bytes) != cudaSuccess ||
       cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, bytes) != cudaSuccess || blocks == 0)) {
    cudaGetLastError();  // the launch will report what is wrong; its own check must not report this
    return 1;
  }
  return blocks * device.multiprocessors;
}

UNMASK_DEVICE unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char storage[];
  return storage;
}

// 2^x to about 2 ulp; results below the normal range are 0.
UNMASK_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 16 bytes that will not be read again soon: past L1.
UNMASK_DEVICE uint4 load_streaming(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

// 16 bytes from global to shared memory, behind the calling thread's back: commit_copies() closes a group, and
// wait_copies<N>() returns once at most the N newest groups of this thread are still under way.
UNMASK_DEVICE void copy_async(void* shared, const void* global) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}
UNMASK_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kNewest>
UNMASK_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kNewest) : "memory");
}

// Orders what the thread wrote and read before with what comes after, for all of the device: acquire and release.
// __threadfence() also puts all fences in one order, which takes longer.
UNMASK_DEVICE void fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

constexpr int kCountBits = 24;  // of a meeting's word

// What tells a launch from what may be in memory before it, in the bits above the count; never 0.
inline uint64_t launch_number() {
  static std::atomic<uint64_t> last{std::random_device()()};
  return (++last * 0x9e3779b97f4a7c15u | uint64_t{1} << kCountBits) >> kCountBits << kCountBits;
}

// Where blocks of a launch meet: a word with the launch's number and how many have come. It may hold anything before (but
// for one chance in 2^40) and is 0 in the end, so that nothing must be launched to clear it.
struct Meeting {
  unsigned long long *word, launch;
  unsigned blocks;
  unsigned long long met = 0;

  // By one thread of each block, before all else.
  UNMASK_DEVICE void open() const {
    const unsigned long long found = *const_cast<volatile unsigned long long*>(word);
    if (found >> kCountBits != launch >> kCountBits) atomicCAS(word, found, launch);
  }
  // By one thread: how many have come so far.
  UNMASK_DEVICE unsigned long long arrive() const { return atomicAdd(word, 1ull) + 1 - launch; }
  // By the block: until all have come here; what they wrote can be read then. All blocks are on the device together.
  UNMASK_DEVICE void meet() {
    __syncthreads();
    if (blocks == 1) return;
    met += blocks;
    if (threadIdx.x == 0) {
      fence();
      arrive();
      while (static_cast<long long>(*const_cast<volatile unsigned long long*>(word) - launch - met) < 0) {
      }
      fence();
    }
    __syncthreads();
  }
  // By one thread of each block, after all else.
  UNMASK_DEVICE void close() const {
    if (arrive() == met + blocks) atomicExch(word, 0ull);
  }
};

UNMASK_DEVICE void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// `statement` where the code is for a device that has clusters and dependent launches, else `other`. A kernel compiled for
// one without clusters is only ever launched with clusters of one.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define UNMASK_CLUSTERS(statement, other) statement
#else
#define UNMASK_CLUSTERS(statement, other) other
#endif

// For kernels launched as `dependent`: lets the next such kernel start once every block has come here or ended; and waits
// until all kernels before this one are done, and their writes visible.
UNMASK_DEVICE void launch_dependents() {
  UNMASK_CLUSTERS(asm volatile("griddepcontrol.launch_dependents;" :: : "memory"), );
}
UNMASK_DEVICE void wait_for_launches() { UNMASK_CLUSTERS(asm volatile("griddepcontrol.wait;" :: : "memory"), ); }

UNMASK_DEVICE void cluster_arrive() {
  UNMASK_CLUSTERS(asm volatile("barrier.cluster.arrive.release.aligned;" :: : "memory"), );
}
// Orders no memory, and so does not wait for any: where the others are to know that this block has come so far, and
// read nothing that it wrote.
UNMASK_DEVICE void cluster_arrive_relaxed() {
  UNMASK_CLUSTERS(asm volatile("barrier.cluster.arrive.relaxed.aligned;" :: : "memory"), );
}
UNMASK_DEVICE void cluster_wait() {
  UNMASK_CLUSTERS(asm volatile("barrier.cluster.wait.acquire.aligned;" :: : "memory"), __syncthreads());
}
// The address of `p`, an object in this block's shared memory, in block `rank` of the cluster.
template <typename T>
UNMASK_DEVICE T* cluster_map(T* p, unsigned rank) {
  auto at = reinterpret_cast<uint64_t>(p);
  UNMASK_CLUSTERS(asm("mapa.u64 %0, %0, %1;" : "+l"(at) : "r"(rank)), );
  return reinterpret_cast<T*>(at);
}

// A float as an unsigned integer of the same order (both zeros must be +0; NaN sorts outside the infinities). No
// number maps to 0, which therefore stands for "nothing".
UNMASK_DEVICE uint32_t ordered_bits(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
UNMASK_DEVICE float from_ordered_bits(uint32_t ordered) {
  return __uint_as_float(ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered);
}

// Larger is better: the value first, then the lower id.
UNMASK_DEVICE uint64_t make_key(float value, uint32_t id) {
  return static_cast<uint64_t>(ordered_bits(value + 0.0f)) << 32 | static_cast<uint32_t>(~id);
}
UNMASK_DEVICE float key_value(uint64_t key) { return from_ordered_bits(static_cast<uint32_t>(key >> 32)); }
UNMASK_DEVICE uint32_t key_id(uint64_t key) { return ~static_cast<uint32_t>(key); }

// What combine() makes of x over the lanes of a warp, or over groups of `lanes` of them, a power of 2; in all of them.
template <typename T, typename Combine>
UNMASK_DEVICE T warp_all(T x, const Combine& combine, int lanes = 32) {
  for (int offset = lanes / 2; offset > 0; offset >>= 1) x = combine(x, __shfl_xor_sync(kFullWarp, x, offset));
  return x;
}
UNMASK_DEVICE float warp_max(float x, int lanes = 32) {
  return warp_all(x, [](float a, float b) { return fmaxf(a, b); }, lanes);
}
UNMASK_DEVICE float warp_sum(float x, int lanes = 32) {
  return warp_all(x, [](float a, float b) { return a + b; }, lanes);
}
UNMASK_DEVICE uint64_t warp_max(uint64_t x, int lanes = 32) {
  using Bits = unsigned long long;  // a type that shuffles know
  return warp_all(static_cast<Bits>(x), [](Bits a, Bits b) { return b > a ? b : a; }, lanes);
}

}  // namespace unmask::cuda
