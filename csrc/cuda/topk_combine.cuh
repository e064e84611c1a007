// From what threads found to a block's findings, and from those of a row's blocks to the row's results.
#pragma once
#include "topk_row.cuh"

namespace unmask::cuda {

constexpr int kTopkWarps = kTopkThreads / 32;
constexpr int kMaxLog2Parts = 3;  // the largest portable cluster is 8

// What one block found out about its part of a row.
struct Partial {
  Sums sums;
  uint64_t sample;  // key of (score, id), 0 = none
  uint64_t keys[kMaxTopK];
};

struct Shared {
  Partial inbox[1 << kMaxLog2Parts];
  Sums warp_sums[kTopkWarps];
  uint64_t warp_keys[kTopkWarps];
  uint64_t warp_samples[kTopkWarps];
  unsigned last;
};

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

// By the block: its warps' sums and its threads' best keys and samples combined into `out`, by the first thread.
template <bool kSample, bool kEntropy>
UNMASK_DEVICE void reduce_block(Sums sums, uint64_t key, uint64_t sample, Shared* shared, Partial* out) {
  const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  key = warp_max(key);
  if (kSample) sample = warp_max(sample);
  if (lane == 0) {
    shared->warp_sums[warp] = sums;
    shared->warp_keys[warp] = key;
    shared->warp_samples[warp] = sample;
  }
  __syncthreads();
  if (warp != 0) return;
  sums = shared->warp_sums[lane % kTopkWarps];
  reduce_sums<kEntropy>(kTopkWarps, &sums);
  key = warp_max(shared->warp_keys[lane % kTopkWarps], kTopkWarps);
  if (kSample) sample = warp_max(shared->warp_samples[lane % kTopkWarps], kTopkWarps);
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
    const bool greater = list[middle] > key;
    low = greater ? middle + 1 : low;
    high = greater ? high : middle;
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
// `partials` and `finished` are the row's.
UNMASK_DEVICE bool meet_in_workspace(Partial* partials, const Meeting& finished, unsigned part, int k, Shared* shared) {
  send(shared->inbox[0], k, partials + part);
  __syncthreads();
  if (threadIdx.x == 0) {  // the thread that arrives must fence, too, for what the others have written and will read
    finished.open();
    fence();
    shared->last = finished.arrive() == finished.blocks ? 1 : 0;
    fence();
    if (shared->last) atomicExch(finished.word, 0ull);
  }
  __syncthreads();
  if (!shared->last) return false;
  for (unsigned i = 0; i < finished.blocks; ++i) send(partials[i], k, shared->inbox + i);
  __syncthreads();
  return true;
}

}  // namespace unmask::cuda
