// choose on CUDA: one block per row.
#include "../ops/choose_row.h"
#include "row_block.cuh"

namespace unmask::cuda {
namespace {

__global__ void __launch_bounds__(RowBlock::threads) choose_kernel(const __grid_constant__ ChooseParams params) {
  launch_dependents();
  wait_for_launches();
  const RowBlock block;
  choose_row(params, blockIdx.x, block, ChooseScratch(block.rest, params.length));
}

}  // namespace

int choose(const ChooseParams& params, void* stream) {
  return launch_rows(choose_kernel, params, params.length * ChooseScratch::kBytes, stream);
}

}  // namespace unmask::cuda
