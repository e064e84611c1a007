// topk_confidence: softmax statistics of each row of logits in one pass over the vocabulary.
//
// For every processed row x of V logits, with p = softmax(x) computed over all V entries:
//   * confidence[0..k), token[0..k): the k largest p and their ids, descending; candidates are all ids but those in
//     `exclude` (which stay in the denominator). Ordered by logit, equal logits by lowest id; -inf entries have
//     p = 0 and come last, by lowest id.
//   * sample, sample_confidence: at temperature 0 the first of the k; at temperature T > 0 the candidate that
//     maximises fmaf(x, 1/T, gumbel) in float32 (equal scores: lowest id), and its p at temperature 1. Token v's gumbel
//     comes from word v % 4 of philox4x32(seed, v / 4, position, step, sequence), see random.h. A -inf entry has
//     score -inf.
//   * logsumexp = log sum exp x; entropy = -sum p log p (0 log 0 = 0), on request (null pointer = not wanted).
// A row whose softmax is undefined (a NaN, a +inf, or nothing but -inf) is *poisoned*: all its floats are NaN, all
// its ids -1. A skipped row (select[row] == 0) gets confidence 0, ids -1, logsumexp and entropy 0.
// Error of a confidence against float64: < 1e-5 absolute at V = 126464, every dtype.
#pragma once
#include <stdint.h>

#include "random.h"

namespace unmask {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

constexpr int kMaxTopK = 64;
constexpr int kMaxExclude = 16;

struct TopkConfidenceParams {
  const void* logits;  // row r starts at logits + offset(r) elements; a row's V entries are contiguous
  DType dtype;
  int64_t num_rows;      // rows to produce
  int64_t vocab;         // V >= 1
  int64_t inner;         // logits are (num_outer, inner, V): source row s is at
  int64_t stride_outer;  //   (s / inner) * stride_outer + (s % inner) * stride_inner elements
  int64_t stride_inner;
  const int64_t* rows;  // null, or (num_rows): output row r reads source row rows[r] (validated by the caller on CPU;
                        // on CUDA an id outside [0, num_source_rows) poisons the row)
  int64_t num_source_rows;
  const uint8_t* select;         // null, or (num_rows) bool: 0 = skip the row
  int k;                         // 1..kMaxTopK and k <= V - num_exclude (exclude holds distinct ids in [0, V))
  int64_t exclude[kMaxExclude];  // sorted ascending
  int num_exclude;
  float inverse_temperature;  // 0 = greedy; else 1 / T
  const int64_t* seed;        // one value on the device of the logits; null when greedy
  const int64_t* counter;     // (num_rows, 3) int64: sequence, position, step (low 32 bits used), contiguous;
                              // null = (0, source row, 0)
  float* confidence;          // (num_rows, k)
  int64_t* token;             // (num_rows, k)
  int64_t* sample;            // (num_rows)
  float* sample_confidence;   // (num_rows)
  float* logsumexp;           // (num_rows) or null
  float* entropy;             // (num_rows) or null

  UNMASK_HD bool excluded(int64_t id) const {
    for (int i = 0; i < num_exclude; ++i) {
      if (exclude[i] == id) return true;
    }
    return false;
  }
  // Where source row `source` begins, in elements.
  UNMASK_HD int64_t offset(int64_t source) const {
    const int64_t outer = source < inner ? 0 : source / inner;  // the division takes hundreds of cycles on CUDA
    return outer * stride_outer + (source - outer * inner) * stride_inner;
  }
  // Whose draws output row `row` takes, at a temperature above 0.
  UNMASK_HD DrawKey draw_key(int64_t row, int64_t source) const {
    DrawKey key{static_cast<uint64_t>(*seed), 0, static_cast<uint32_t>(source), 0};
    if (counter) {
      key.sequence = static_cast<uint32_t>(counter[3 * row]);
      key.position = static_cast<uint32_t>(counter[3 * row + 1]);
      key.step = static_cast<uint32_t>(counter[3 * row + 2]);
    }
    return key;
  }
};

namespace cpu {
// Runs on the calling thread for rows [begin, end); picks the instruction set at run time.
void topk_confidence(const TopkConfidenceParams& params, int64_t begin, int64_t end);
}  // namespace cpu

namespace cuda {
// Bytes of zero-initialised-by-nobody scratch the launch needs; the kernel leaves no state behind in it.
int64_t topk_confidence_workspace(const TopkConfidenceParams& params);
// Asynchronous on `stream` (a cudaStream_t). Returns a cudaError_t as int.
int topk_confidence(const TopkConfidenceParams& params, void* workspace, void* stream);
}  // namespace cuda

}  // namespace unmask
