// topk_confidence on CUDA: one launch, each row's vocabulary split over up to 8 blocks.
//
// A block streams over its part of the row once, every thread with several 16-byte loads under way. On devices with clusters a row's blocks form one and send what they found to the first block's
// shared memory; on others they leave it in the workspace, and the block that finishes last puts it together.
#include "../ops/topk_confidence.h"

#include <type_traits>

#include "topk_row.cuh"
#include "topk_sample.cuh"
#include "topk_select.cuh"

namespace unmask {
namespace cuda {
namespace {

constexpr int kWarps = kTopkThreads / 32;
constexpr int kMaxLog2Parts = 3;  // the largest portable cluster is 8

// What one block found out about its part of a row.
struct Partial {
  Sums sums;
  uint64_t sample;  // key of (score, id), 0 = none
  uint64_t keys[kMaxTopK];
};

struct Plan {
  int log2_parts;   // blocks per row, a power of 2
  int num_cells;    // per thread, k > 1 only
  int group;        // batches per cell
  int num_batches;  // per block
  bool cluster;     // parts > 1 meet in a cluster, else in the workspace

  __host__ __device__ unsigned parts() const { return 1u << log2_parts; }
};

struct Work {
  TopkConfidenceParams params;
  Plan plan;
  Partial* partials;   // (num_rows, parts), where the parts meet in the workspace
  unsigned* finished;  // (num_rows), zeroed
};

struct Shared {
  Partial inbox[1 << kMaxLog2Parts];
  Sums warp_sums[kWarps];
  uint64_t warp_keys[kWarps];
  uint64_t warp_samples[kWarps];
  unsigned last;
};

// Dynamic shared memory: Shared, and for k > 1 SelectScratch and the cells.
constexpr int kSelectOffset = (sizeof(Shared) + 15) / 16 * 16;
constexpr int kCellsOffset = (kSelectOffset + sizeof(SelectScratch) + 15) / 16 * 16;

// Results of a row without numbers of its own: poisoned, or skipped.
UNMASK_DEVICE void fill_row(const TopkConfidenceParams& p, int64_t row, float confidence, float other) {
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < p.k) {
    p.confidence[row * p.k + thread] = confidence;
    p.token[row * p.k + thread] = -1;
  }
  if (thread == 0) {
    p.sample[row] = -1;
    p.sample_confidence[row] = confidence;
    if (p.logsumexp) p.logsumexp[row] = other;
    if (p.entropy) p.entropy[row] = other;
  }
}

// Over groups of lanes.
template <bool kEntropy>
UNMASK_DEVICE void reduce_sums(int lanes, Sums* sums) {
  sums->raise<kEntropy>(warp_max(sums->reference, lanes));
  sums->sum = warp_sum(sums->sum, lanes);
  if (kEntropy) sums->weighted = warp_sum(sums->weighted, lanes);
}

// By the block: its warps' sums and its threads' best keys (k = 1) and samples combined into `out`, by the first thread.
template <bool kSelect, bool kSample, bool kEntropy>
UNMASK_DEVICE void reduce_block(Sums sums, uint64_t key, uint64_t sample, Shared* shared, Partial* out) {
  const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (!kSelect) key = warp_max(key);
  if (kSample) sample = warp_max(sample);
  if (lane == 0) {
    shared->warp_sums[warp] = sums;
    shared->warp_keys[warp] = key;
    shared->warp_samples[warp] = sample;
  }
  __syncthreads();
  if (warp != 0) return;
  sums = shared->warp_sums[lane % kWarps];
  reduce_sums<kEntropy>(kWarps, &sums);
  if (!kSelect) key = warp_max(shared->warp_keys[lane % kWarps], kWarps);
  if (kSample) sample = warp_max(shared->warp_samples[lane % kWarps], kWarps);
  if (lane == 0) {
    out->sums = sums;
    out->sample = sample;
    out->keys[0] = key;
  }
}

// The parts' sums, combined; all of them at once, since each takes an exponential.
UNMASK_DEVICE Sums total_of(const Partial* parts, unsigned num_parts) {
  Sums total, part[1 << kMaxLog2Parts];
#pragma unroll
  for (unsigned i = 0; i < 1u << kMaxLog2Parts; ++i) {
    if (i < num_parts) part[i] = parts[i].sums;
    total.reference = fmaxf(total.reference, part[i].reference);
  }
#pragma unroll
  for (unsigned i = 0; i < 1u << kMaxLog2Parts; ++i) {
    part[i].raise(total.reference);
    total.sum += part[i].sum;
    total.weighted += part[i].weighted;
  }
  return total;
}

// How many of a descending list are greater than `key`.
UNMASK_DEVICE int count_greater(const uint64_t* list, int n, uint64_t key) {
  int low = 0, high = n;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (list[middle] > key) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// By the block: the row's results from its parts' findings in shared memory.
template <bool kSample, typename Format>
UNMASK_DEVICE void finish_row(const TopkConfidenceParams& p, const Row<Format>& row, int64_t row_index,
                              const Partial* parts, unsigned num_parts) {
  const Sums sums = total_of(parts, num_parts);
  if (!(sums.sum > 0.0f)) {  // NaN, or nothing but -inf
    fill_row(p, row_index, NAN, NAN);
    return;
  }
  const Exponent exponent(sums.reference);
  for (int n = static_cast<int>(threadIdx.x); n < static_cast<int>(num_parts) * p.k; n += kTopkThreads) {
    const unsigned part = static_cast<unsigned>(n / p.k);
    int rank = n % p.k;
    const uint64_t key = parts[part].keys[rank];
    for (unsigned other = 0; other < num_parts && rank < p.k; ++other) {
      if (other != part) rank += count_greater(parts[other].keys, p.k, key);
    }
    if (key == 0 || rank >= p.k) continue;
    const float confidence = exp2_fast(exponent.of(key_value(key))) / sums.sum;
    p.confidence[row_index * p.k + rank] = confidence;
    p.token[row_index * p.k + rank] = key_id(key);
    if (!kSample && rank == 0) {
      p.sample[row_index] = key_id(key);
      p.sample_confidence[row_index] = confidence;
    }
  }
  if (threadIdx.x != 0) return;
  if (kSample) {
    uint64_t best = parts[0].sample;
    for (unsigned i = 1; i < num_parts; ++i) best = parts[i].sample > best ? parts[i].sample : best;
    const uint32_t id = key_id(best);
    p.sample[row_index] = id;
    p.sample_confidence[row_index] = exp2_fast(exponent.of(row.value(id))) / sums.sum;
  }
  const float log_sum = logf(sums.sum);
  // exponent.of(reference) is what its rounding is off by.
  if (p.logsumexp) p.logsumexp[row_index] = sums.reference + (log_sum - exponent.of(sums.reference) * kLn2);
  if (p.entropy) p.entropy[row_index] = fmaxf(log_sum - sums.weighted / sums.sum * kLn2, 0.0f);
}

// By the block: copies the block's findings to `to`, which may be another block's shared memory.
UNMASK_DEVICE void send(const Partial& from, int k, Partial* to) {
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < k) to->keys[thread] = from.keys[thread];
  if (thread == k) to->sums = from.sums;
  if (thread == k + 1) to->sample = from.sample;
}

// By the block, parts meeting in the workspace: true in the block that comes last, which then has all parts.
UNMASK_DEVICE bool meet_in_workspace(const Work& work, int64_t row, unsigned part, Shared* shared) {
  const unsigned parts = work.plan.parts();
  Partial* partials = work.partials + row * parts;
  send(shared->inbox[0], work.params.k, partials + part);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) shared->last = atomicAdd(work.finished + row, 1u) + 1 == parts ? 1 : 0;
  __syncthreads();
  if (!shared->last) return false;
  __threadfence();
  for (unsigned i = 0; i < parts; ++i) send(partials[i], work.params.k, shared->inbox + i);
  __syncthreads();
  return true;
}

template <typename Format, bool kSelect, bool kSample, bool kEntropy>
__global__ void __launch_bounds__(kTopkThreads, kSample ? 2 : 4) topk_kernel(const __grid_constant__ Work work) {
  const TopkConfidenceParams& p = work.params;
  const unsigned parts = work.plan.parts();
  const bool cluster = parts > 1 && work.plan.cluster;
  const int64_t row_index = blockIdx.x >> work.plan.log2_parts;
  const unsigned part = blockIdx.x & (parts - 1);
  const int thread = static_cast<int>(threadIdx.x);

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
  // The wait before sending: by then the first block has started. That is all it says, nothing is written yet.
  if (cluster) cluster_arrive_relaxed();

  Shared* shared = reinterpret_cast<Shared*>(dynamic_shared());
  SelectScratch* scratch = reinterpret_cast<SelectScratch*>(dynamic_shared() + kSelectOffset);
  uint64_t* cells = reinterpret_cast<uint64_t*>(dynamic_shared() + kCellsOffset);
  const int64_t outer = source < p.inner ? 0 : source / p.inner;  // the division takes hundreds of cycles
  const int64_t offset = outer * p.stride_outer + (source - outer * p.inner) * p.stride_inner;
  const Row<Format> row(p.logits, offset, static_cast<uint32_t>(p.vocab), part, work.plan.log2_parts);
  const Excluded excluded{p.exclude, p.num_exclude};

  Sums sums;
  Exponent exponent(sums.reference);
  Best best;  // of the whole part (k = 1), or of the current cell
  Sampler sampler;
  if (kSample) sampler.start(p, row_index, source);

  uint32_t vector = row.begin + static_cast<uint32_t>(thread);  // the thread's first of the batch
  uint32_t cell_begin = vector;
  int cell = 0, cell_batches = 0;
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
      float candidate = largest;
      if (!kWhole && check_excluded) candidate = largest_candidate(row, excluded, bits, at).value;
      best.consider(candidate, at);
      if (kSample) sample_vector(row, excluded, bits, at, largest, j == 0, &sampler);
      // The next batch's, so that kTopkBatch loads stay under way; not sooner, so that it can take its place.
      if (kWhole) {
        raw[j] = row.load_whole(from, kTile + j * kTopkThreads);
      } else if (more) {
        raw[j] = row.load(from, vector, kTile + j * kTopkThreads, left);
      }
    }
  };
  for (int batch = 0; batch < work.plan.num_batches; ++batch) {
    const bool check_excluded = excluded.touches(row, vector - static_cast<uint32_t>(thread));
    // Not worth the code where most of the time goes into random numbers.
    if (!kSample && !check_excluded && left + thread >= 2 * kTile) {
      stream_batch(std::true_type(), false, true);
    } else {
      stream_batch(std::false_type(), check_excluded, batch + 1 < work.plan.num_batches);
    }
    vector += kTile;
    from += kTile * Format::kWidth;
    left -= kTile;
    if (kSelect && (++cell_batches == work.plan.group || batch + 1 == work.plan.num_batches)) {
      best.settle(row, excluded, cell_begin, cell_batches * kTopkBatch);
      cells[cell * kTopkThreads + thread] = best.vector == kNowhere ? 0 : make_key(best.value, best.vector);
      best = Best();
      cell_begin = vector;
      cell_batches = 0;
      ++cell;
    }
  }

  uint64_t key = 0;
  if (!kSelect) {
    best.settle(row, excluded, row.begin + static_cast<uint32_t>(thread), work.plan.num_batches * kTopkBatch);
    uint4 bits = {0, 0, 0, 0};
    if (best.vector != kNowhere) {
      bits = row.load_first(row.at(best.vector), best.vector);
    }
    reduce_sums<kEntropy>(32, &sums);  // while the vector is on its way
    if (best.vector != kNowhere) {
      const Candidate top = largest_candidate(row, excluded, bits, best.vector);
      key = make_key(top.value, top.id);
    }
  } else {
    reduce_sums<kEntropy>(32, &sums);
  }
  reduce_block<kSelect, kSample, kEntropy>(sums, key, kSample ? sampler.key() : 0, shared, &shared->inbox[0]);
  __syncthreads();
  if (kSelect) {
    select_best(row, excluded, cells, work.plan.num_cells, work.plan.group, p.k, scratch, shared->inbox[0].keys);
  }

  if (cluster) {
    cluster_wait();
    if (part != 0) {
      send(shared->inbox[0], p.k, cluster_map(&shared->inbox[part], 0));
      cluster_arrive();  // releases what was sent
      return;
    }
    cluster_arrive_relaxed();  // the others read nothing of the first block's
    cluster_wait();
  } else if (parts > 1) {
    if (!meet_in_workspace(work, row_index, part, shared)) return;
  }
  finish_row<kSample>(p, row, row_index, shared->inbox, parts);
}

// Splits rows until the device is full, but leaves every block at least half a batch.
Plan make_plan(const TopkConfidenceParams& p, const DeviceInfo& device) {
  const int64_t width = p.dtype == DType::kFloat32 ? Float32::kWidth : BFloat16::kWidth;
  const int64_t vectors = (p.vocab + 2 * width - 2) / width;  // the worst alignment
  const int64_t resident = 4;                                 // blocks of a multiprocessor
  // Of selected rows, usually a small part is left to do.
  const int64_t rows = p.select ? (p.num_rows + 7) / 8 : p.num_rows;
  Plan plan = {};
  while (plan.log2_parts < kMaxLog2Parts && rows * plan.parts() < device.multiprocessors * resident * 9 / 10 &&
         vectors / (2 * plan.parts()) >= kTile / 2) {
    plan.log2_parts += 1;
  }
  const int64_t own = vectors / plan.parts() + 1;
  plan.num_batches = static_cast<int>((own + kTile - 1) / kTile);
  plan.group = (plan.num_batches + kMaxCells - 1) / kMaxCells;
  plan.num_cells = (plan.num_batches + plan.group - 1) / plan.group;
  plan.cluster = device.clusters;
  return plan;
}

int64_t counter_bytes(const TopkConfidenceParams& p) { return (p.num_rows * 4 + 15) / 16 * 16; }

template <typename Format, bool kSelect>
cudaError_t run(const Work& work, void* stream) {
  const Plan& plan = work.plan;
  LaunchShape shape = {};
  shape.grid_x = static_cast<unsigned>(work.params.num_rows * plan.parts());
  shape.grid_y = 1;
  shape.threads = kTopkThreads;
  shape.cluster = plan.cluster ? plan.parts() : 1;
  shape.shared_bytes =
      kSelect ? kCellsOffset + plan.num_cells * kTopkThreads * static_cast<int>(sizeof(uint64_t)) : sizeof(Shared);
  shape.stream = stream;
  if (work.params.inverse_temperature != 0.0f) return launch(topk_kernel<Format, kSelect, true, true>, shape, work);
  return work.params.entropy ? launch(topk_kernel<Format, kSelect, false, true>, shape, work)
                             : launch(topk_kernel<Format, kSelect, false, false>, shape, work);
}

template <typename Format>
cudaError_t run(const Work& work, void* stream) {
  return work.params.k > 1 ? run<Format, true>(work, stream) : run<Format, false>(work, stream);
}

}  // namespace

int64_t topk_confidence_workspace(const TopkConfidenceParams& params) {
  DeviceInfo device;
  if (query_device(&device) != cudaSuccess) return 0;
  const Plan plan = make_plan(params, device);
  if (plan.log2_parts == 0 || plan.cluster) return 0;
  return counter_bytes(params) + params.num_rows * plan.parts() * static_cast<int64_t>(sizeof(Partial));
}

int topk_confidence(const TopkConfidenceParams& params, void* workspace, void* stream) {
  if (params.num_rows == 0) return cudaSuccess;
  DeviceInfo device;
  cudaError_t error = query_device(&device);
  if (error != cudaSuccess) return error;
  Work work = {params, make_plan(params, device), nullptr, nullptr};
  if (params.num_rows * work.plan.parts() > INT32_MAX) return cudaErrorInvalidValue;
  if (work.plan.log2_parts > 0 && !work.plan.cluster) {
    work.finished = static_cast<unsigned*>(workspace);
    work.partials = reinterpret_cast<Partial*>(static_cast<unsigned char*>(workspace) + counter_bytes(params));
    error = cudaMemsetAsync(work.finished, 0, static_cast<size_t>(params.num_rows) * 4,
                            static_cast<cudaStream_t>(stream));
    if (error != cudaSuccess) return error;
  }
  switch (params.dtype) {
    case DType::kFloat32:
      return run<Float32>(work, stream);
    case DType::kBFloat16:
      return run<BFloat16>(work, stream);
    case DType::kFloat16:
      return run<Float16>(work, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace cuda
}  // namespace unmask
