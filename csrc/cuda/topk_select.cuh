// Exact selection of the k best of a block's candidates, k up to 64.
//
// While streaming, each thread keeps the best value of its vectors and the first vector that has it. Ordered by (value,
// vector), the k-th best *thread* bounds the k best elements from below, because each thread before it holds an element
// that beats everything under the bound. So the vectors of at most k threads need a second look, from L2.
#pragma once
#include "topk_row.cuh"

namespace unmask::cuda {

constexpr int kMaxCandidates = 2048;  // keys under selection at a time
constexpr int kUnitsPerRound = 32;    // batches re-read between two looks at the number of candidates
constexpr int kRankDirectly = 256;    // up to so many keys are ordered by counting

struct SelectScratch {
  uint64_t candidates[kMaxCandidates];  // first the threads' best keys
  uint64_t kept[kMaxTopK];
  uint32_t list[kMaxTopK];  // threads
  uint64_t threshold;
  int list_count;
  int candidate_count;
  int kept_count;
};

// By one warp: a bound that exactly k of the n keys reach (distinct but for zeros), or 1 if fewer than k are not zero.
// Builds it bit by bit from the top, over the bits in which the keys differ.
UNMASK_DEVICE uint64_t kth_key(const uint64_t* keys, int n, int k) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  unsigned long long any = 0, all = ~0ull;
  for (int i = lane; i < n; i += 32) {
    any |= keys[i];
    all &= keys[i];
  }
  any = warp_all(any, [](auto a, auto b) { return a | b; });
  all = warp_all(all, [](auto a, auto b) { return a & b; });
  unsigned long long differ = any & ~all, bound = all;
  while (differ != 0) {
    const unsigned long long bit = 1ull << (63 - __clzll(static_cast<long long>(differ)));
    differ &= ~bit;
    int count = 0;
    for (int i = lane; i < n; i += 32) count += keys[i] >= (bound | bit) ? 1 : 0;
    count = __reduce_add_sync(kFullWarp, count);
    if (count >= k) bound |= bit;
    if (count == k) break;
  }
  return bound == 0 ? 1 : bound;
}

// By the block: kth_key of candidates[0, n), whose last writes it waits for; nothing is kept.
UNMASK_DEVICE uint64_t find_threshold(SelectScratch* s, int n, int k) {
  __syncthreads();
  if (threadIdx.x < 32) {
    const uint64_t bound = kth_key(s->candidates, n, k);
    if (threadIdx.x == 0) s->threshold = bound;
  }
  if (threadIdx.x == 0) s->kept_count = 0;
  __syncthreads();
  return s->threshold;
}

// By the block: moves the k best of candidates[0, n) to kept[], unordered, and their number to kept_count.
UNMASK_DEVICE void keep_best(SelectScratch* s, int n, int k) {
  const uint64_t threshold = find_threshold(s, n, k);
  for (int i = static_cast<int>(threadIdx.x); i < n; i += kTopkThreads) {
    if (s->candidates[i] >= threshold) s->kept[atomicAdd(&s->kept_count, 1)] = s->candidates[i];
  }
  __syncthreads();
}

// By the block: the min(n, k) best of keys[0, n) in descending order; zeros after them. Not in place.
UNMASK_DEVICE void order_keys(const uint64_t* keys, int n, int k, uint64_t* ordered) {
  for (int i = static_cast<int>(threadIdx.x); i < k; i += kTopkThreads) {
    if (i >= n) ordered[i] = 0;
  }
  for (int i = static_cast<int>(threadIdx.x); i < n; i += kTopkThreads) {
    const uint64_t key = keys[i];
    int rank = 0;
    for (int j = 0; j < n; ++j) rank += keys[j] > key ? 1 : 0;
    if (rank < k) ordered[rank] = key;
  }
}

// Reads batch `batch` of thread `thread` again, one element per lane and `units` batches per warp.
template <typename Format>
UNMASK_DEVICE void reread(const Row<Format>& row, uint32_t batch, uint32_t thread, int element, uint64_t threshold,
                          SelectScratch* s) {
  const uint32_t j = static_cast<uint32_t>(element / Format::kWidth);
  const uint32_t vector = row.begin + batch * kTile + j * kTopkThreads + thread;
  const uint32_t id = row.id(vector, element % Format::kWidth);
  if (vector >= row.end || !row.is_candidate(id)) return;
  const float x = row.value(id);
  if (make_key(x, vector) < threshold) return;
  s->candidates[atomicAdd(&s->candidate_count, 1)] = make_key(x, id);
}

// By the block, after streaming: the k best keys (value, id) of the block's part of the row, descending, zeros if
// there are fewer. `mine` is the thread's best key (value, vector), or 0.
template <typename Format>
UNMASK_DEVICE_COLD void select_best(const Row<Format> row, uint64_t mine, int num_batches, int k, SelectScratch* s,
                                    uint64_t* ordered) {
  const int thread = static_cast<int>(threadIdx.x);
  s->candidates[thread] = mine;
  if (thread == 0) s->list_count = s->candidate_count = 0;
  const uint64_t threshold = find_threshold(s, kTopkThreads, k);
  if (mine >= threshold) s->list[atomicAdd(&s->list_count, 1)] = static_cast<uint32_t>(thread);
  __syncthreads();

  constexpr int kElements = kTopkBatch * Format::kWidth;  // of a batch: 16 or 32
  const int units = s->list_count * num_batches;
  for (int from = 0; from < units; from += kUnitsPerRound) {
    const int to = from + kUnitsPerRound < units ? from + kUnitsPerRound : units;
    for (int unit = from + thread / kElements; unit < to; unit += kTopkThreads / kElements) {
      const auto batch = static_cast<uint32_t>(unit % num_batches);
      reread(row, batch, s->list[unit / num_batches], thread % kElements, threshold, s);
    }
    __syncthreads();
    const int count = s->candidate_count;
    __syncthreads();
    // Room for another round, whatever it finds.
    if (to < units && count > kMaxCandidates - kUnitsPerRound * kElements) {
      keep_best(s, count, k);
      for (int i = thread; i < s->kept_count; i += kTopkThreads) s->candidates[i] = s->kept[i];
      if (thread == 0) s->candidate_count = s->kept_count;
      __syncthreads();
    }
  }
  const int count = s->candidate_count;
  if (count > kRankDirectly) {
    keep_best(s, count, k);
    order_keys(s->kept, s->kept_count, k, ordered);
  } else {
    order_keys(s->candidates, count, k, ordered);
  }
  __syncthreads();
}

}  // namespace unmask::cuda
