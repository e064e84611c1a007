// unmask_ on CUDA: one block per row. The rows are short, so a launch costs more than the work in it.
#include "../ops/unmask_row.h"
#include "row_block.cuh"

namespace unmask::cuda {
namespace {

__global__ void __launch_bounds__(RowBlock::threads) unmask_kernel(const __grid_constant__ UnmaskParams params) {
  launch_dependents();
  wait_for_launches();
  unmask_row(params, blockIdx.x, RowBlock());
}

}  // namespace

int unmask(const UnmaskParams& params, void* stream) {
  const int64_t block = params.block_length < params.length ? params.block_length : params.length;
  // For a block of some 28,000 positions on Hopper: more than any generation buffer.
  const int64_t times = params.mode == ActionMode::kDpls ? block * static_cast<int64_t>(sizeof(double)) : 0;
  return launch_rows(unmask_kernel, params, times, stream);
}

}  // namespace unmask::cuda
