// topk_confidence on CUDA: one launch, each row's vocabulary split over up to 8 blocks.
//
// A block streams over its part of the row once, every thread with several 16-byte loads under way. On devices with
// clusters a row's blocks form one and send what they found to the first block's shared memory; on others they leave it
// in the workspace, and the block that finishes last puts it together.
#include "../ops/topk_confidence.h"

#include <algorithm>
#include <type_traits>

#include "topk_combine.cuh"
#include "topk_sample.cuh"
#include "topk_select.cuh"

namespace unmask::cuda {
namespace {

struct Plan {
  int log2_parts;   // blocks per row, a power of 2
  int num_batches;  // per block
  bool cluster;     // parts > 1 meet in a cluster, else in the workspace

  __host__ __device__ unsigned parts() const { return 1u << log2_parts; }
};

struct Work {
  TopkConfidenceParams params;
  Plan plan;
  // Where the parts meet in the workspace.
  unsigned long long* finished;  // (num_rows)
  uint64_t launch;
  Partial* partials;  // (num_rows, parts)
};

// Dynamic shared memory: Shared, and for k > 1 SelectScratch.
constexpr int kSelectOffset = (sizeof(Shared) + 15) / 16 * 16;

template <typename Format, bool kSample, bool kEntropy>
__global__ void __launch_bounds__(kTopkThreads, kSample ? 2 : 4) topk_kernel(const __grid_constant__ Work work) {
  const TopkConfidenceParams& p = work.params;
  const unsigned parts = work.plan.parts();
  const bool cluster = parts > 1 && work.plan.cluster;
  const int64_t row_index = blockIdx.x >> work.plan.log2_parts;
  const unsigned part = blockIdx.x & (parts - 1);
  const int thread = static_cast<int>(threadIdx.x);
  launch_dependents();
  wait_for_launches();

  // Every block of the row takes these exits together.
  if (p.select && !p.select[row_index]) {
    if (part == 0) fill_row(p, row_index, 0.0f, 0.0f);
    return;
  }
  const int64_t source = p.rows ? p.rows[row_index] : row_index;
  if (source < 0 || source >= p.num_source_rows) {
    if (part == 0) fill_row(p, row_index, NAN, NAN);
    return;
  }
  // The wait before sending: by then the first block has started. It says no more, nothing is written yet.
  if (cluster) cluster_arrive_relaxed();

  Shared* shared = reinterpret_cast<Shared*>(dynamic_shared());
  SelectScratch* scratch = reinterpret_cast<SelectScratch*>(dynamic_shared() + kSelectOffset);
  const Row<Format> row(p, source, part, work.plan.log2_parts);

  Sums sums;
  Exponent exponent(sums.reference);
  Best best;
  Sampler sampler{kSample ? p.draw_key(row_index, source) : DrawKey{}, p.inverse_temperature};

  uint32_t vector = row.begin + static_cast<uint32_t>(thread);  // the thread's first of the batch
  const typename Format::Element* from = row.at(vector);
  uint4 raw[kTopkBatch];
  int left = static_cast<int>(row.whole_end) - static_cast<int>(vector);
  raw[0] = row.load_first(from, vector);
#pragma unroll
  for (int j = 1; j < kTopkBatch; ++j) raw[j] = row.load(from, vector, j * kTopkThreads, left);
  // kWhole: no vector of the next batch needs a check, and no excluded id is in this one.
  const auto stream_batch = [&](auto whole, bool check_excluded, bool more) {
    constexpr bool kWhole = decltype(whole)::value;
#pragma unroll
    for (int j = 0; j < kTopkBatch; ++j) {
      const uint32_t at = vector + static_cast<uint32_t>(j * kTopkThreads);
      const uint4 bits = raw[j];
      float x[Format::kWidth];
      unpack<Format>(bits, x);
      const float largest = vector_max(x);
      sums.add_vector<kEntropy>(x, largest, &exponent);
      const Candidate top = !kWhole && check_excluded ? largest_candidate(row, bits, at) : Candidate{largest, 0};
      if (kWhole || (top.id != kNowhere && at < row.end)) best.consider(top.value, at);
      if (kSample) sample_vector(row, bits, at, largest, j == 0, &sampler);
      // The next batch's, so that kTopkBatch loads stay under way; not sooner, so that it can take its place.
      if (kWhole) {
        raw[j] = row.load_whole(from, kTile + j * kTopkThreads);
      } else if (more) {
        raw[j] = row.load(from, vector, kTile + j * kTopkThreads, left);
      }
    }
  };
  for (int batch = 0; batch < work.plan.num_batches; ++batch) {
    const bool check_excluded = row.excludes_any(vector - static_cast<uint32_t>(thread));
    // Not worth the code where most of the time goes into random numbers.
    if (!kSample && !check_excluded && left + thread >= 2 * kTile) {
      stream_batch(std::true_type(), false, true);
    } else {
      stream_batch(std::false_type(), check_excluded, batch + 1 < work.plan.num_batches);
    }
    vector += kTile;
    from += kTile * Format::kWidth;
    left -= kTile;
  }

  uint4 bits = {0, 0, 0, 0};
  const bool found = best.vector != kNowhere;
  if (found && p.k == 1) bits = row.load_first(row.at(best.vector), best.vector);
  reduce_sums<kEntropy>(32, &sums);  // while the vector is on its way
  uint64_t key = found ? make_key(best.value, best.vector) : 0;
  if (found && p.k == 1) {
    const Candidate top = largest_candidate(row, bits, best.vector);
    key = make_key(top.value, top.id);
  }
  reduce_block<kSample, kEntropy>(sums, key, kSample ? sampler.result() : 0, shared, &shared->inbox[0]);
  __syncthreads();
  if (p.k > 1) select_best(row, key, work.plan.num_batches, p.k, scratch, shared->inbox[0].keys);

  if (cluster) {
    cluster_wait();
    if (part != 0) {
      send(shared->inbox[0], p.k, cluster_map(&shared->inbox[part], 0));
      cluster_arrive();  // releases what was sent
      cluster_wait();    // whoever has arrived must wait before it ends
      return;
    }
    cluster_arrive_relaxed();  // the others read nothing of the first block's
    cluster_wait();
  } else if (parts > 1) {
    Partial* partials = work.partials + row_index * parts;
    const Meeting finished{work.finished + row_index, work.launch, parts};
    if (!meet_in_workspace(partials, finished, part, p.k, shared)) return;
  }
  finish_row<kSample>(p, row, row_index, shared->inbox, parts);
}

using Kernel = void (*)(Work);

template <typename Format>
Kernel kernel_for(const TopkConfidenceParams& p) {
  if (p.inverse_temperature != 0.0f) return topk_kernel<Format, true, true>;
  return p.entropy ? topk_kernel<Format, false, true> : topk_kernel<Format, false, false>;
}

Kernel kernel_for(const TopkConfidenceParams& p) {
  if (p.dtype == DType::kFloat32) return kernel_for<Float32>(p);
  return p.dtype == DType::kBFloat16 ? kernel_for<BFloat16>(p) : kernel_for<Float16>(p);
}

Plan split_rows(const TopkConfidenceParams& p, const DeviceInfo& device, int log2_parts) {
  const int64_t width = p.dtype == DType::kFloat32 ? Float32::kWidth : BFloat16::kWidth;
  const int64_t vectors = (p.vocab + 2 * width - 2) / width;  // the worst alignment
  Plan plan = {};
  plan.log2_parts = log2_parts;
  plan.num_batches = static_cast<int>((vectors / plan.parts() + kTile) / kTile);
  plan.cluster = device.clusters;
  return plan;
}

LaunchShape launch_shape(const TopkConfidenceParams& p, const Plan& plan, void* stream) {
  return {static_cast<unsigned>(p.num_rows * plan.parts()),
          kTopkThreads,
          static_cast<int>(p.k > 1 ? kSelectOffset + sizeof(SelectScratch) : sizeof(Shared)),
          stream,
          plan.cluster ? plan.parts() : 1,
          plan.cluster};
}

// The split that takes the least time. Blocks run in waves of as many as the device holds; a block takes its batches'
// time, and to start and to finish about that of two more. Equally good: the fewest parts.
Plan make_plan(const TopkConfidenceParams& p, const DeviceInfo& device, Kernel kernel) {
  // Of selected rows half, on average: decoding begins with all of them.
  const int64_t rows = p.select ? std::min((p.num_rows + 1) / 2, p.num_source_rows) : p.num_rows;
  Plan best = {};
  int64_t least = INT64_MAX;
  for (int log2_parts = 0; log2_parts <= kMaxLog2Parts; ++log2_parts) {
    const Plan plan = split_rows(p, device, log2_parts);
    // A cluster's blocks may share a multiprocessor, so clusters leave few places empty.
    const int64_t places = resident_blocks(kernel, launch_shape(p, plan, nullptr));
    const int64_t waves = (rows * plan.parts() + places - 1) / places;
    const int64_t time = waves * (plan.num_batches + 2);
    if (time < least) {
      least = time;
      best = plan;
    }
  }
  return best;
}

cudaError_t plan_work(const TopkConfidenceParams& p, Plan* plan) {
  DeviceInfo device;
  const cudaError_t error = query_device(&device);
  if (error == cudaSuccess) *plan = make_plan(p, device, kernel_for(p));
  return error;
}

}  // namespace

int64_t topk_confidence_workspace(const TopkConfidenceParams& params) {
  Plan plan;
  if (plan_work(params, &plan) != cudaSuccess || plan.log2_parts == 0 || plan.cluster) return 0;
  return params.num_rows * static_cast<int64_t>(plan.parts() * sizeof(Partial) + sizeof(*Work::finished));
}

int topk_confidence(const TopkConfidenceParams& params, void* workspace, void* stream) {
  if (params.num_rows == 0) return cudaSuccess;
  Work work{params};
  cudaError_t error = plan_work(params, &work.plan);
  if (error != cudaSuccess) return error;
  if (params.num_rows * work.plan.parts() > INT32_MAX) return cudaErrorInvalidValue;
  if (work.plan.log2_parts > 0 && !work.plan.cluster) {
    work.partials = static_cast<Partial*>(workspace);
    work.finished = reinterpret_cast<unsigned long long*>(work.partials + params.num_rows * work.plan.parts());
    work.launch = launch_number();
  }
  return launch(kernel_for(params), launch_shape(params, work.plan, stream), work);
}

}  // namespace unmask::cuda
