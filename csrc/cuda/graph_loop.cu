// The loop of csrc/ops/graph_loop.h with a conditional node (CUDA 12.4).
#include "../ops/graph_loop.h"

#include <cuda_runtime.h>

namespace unmask {
namespace cuda {

#if CUDART_VERSION >= 12040

namespace {

constexpr int kLoopThreads = 256;
constexpr int kLeastDriver = 12040;

// One block. Sets whether the body runs again.
__global__ void __launch_bounds__(kLoopThreads)
    keep_running(cudaGraphConditionalHandle again, const uint8_t* done, int64_t rows, const int64_t* limit) {
  __shared__ unsigned long long running;
  if (threadIdx.x == 0) running = 0;
  __syncthreads();
  unsigned long long mine = 0;
  for (int64_t i = threadIdx.x; i < rows; i += kLoopThreads) mine += done[i] == 0;
  if (mine > 0) atomicAdd(&running, mine);
  __syncthreads();
  if (threadIdx.x == 0) cudaGraphSetConditional(again, static_cast<int64_t>(running) > *limit ? 1u : 0u);
}

cudaError_t add_node(cudaGraphNode_t* node, cudaGraph_t graph, cudaGraphNodeParams* params) {
#if CUDART_VERSION >= 13000
  return cudaGraphAddNode(node, graph, nullptr, nullptr, 0, params);
#else
  return cudaGraphAddNode(node, graph, nullptr, 0, params);
#endif
}

cudaError_t fill_body(cudaGraph_t body, cudaGraph_t step, cudaGraphConditionalHandle again, const uint8_t* done,
                      int64_t rows, const int64_t* limit) {
  cudaGraphNode_t step_node, count_node;
  cudaError_t error = cudaGraphAddChildGraphNode(&step_node, body, nullptr, 0, step);
  if (error != cudaSuccess) return error;
  void* arguments[] = {&again, &done, &rows, &limit};
  cudaKernelNodeParams kernel = {};
  kernel.func = reinterpret_cast<void*>(keep_running);
  kernel.gridDim = dim3(1, 1, 1);
  kernel.blockDim = dim3(kLoopThreads, 1, 1);
  kernel.kernelParams = arguments;
  return cudaGraphAddKernelNode(&count_node, body, &step_node, 1, &kernel);
}

cudaError_t build(cudaGraph_t graph, cudaGraph_t step, const uint8_t* done, int64_t rows, const int64_t* limit,
                  cudaGraphExec_t* executable) {
  cudaGraphConditionalHandle again;
  cudaError_t error = cudaGraphConditionalHandleCreate(&again, graph, 1, cudaGraphCondAssignDefault);
  if (error != cudaSuccess) return error;
  cudaGraphNodeParams params = {};
  params.type = cudaGraphNodeTypeConditional;
  params.conditional.handle = again;
  params.conditional.type = cudaGraphCondTypeWhile;
  params.conditional.size = 1;
  cudaGraphNode_t node;
  error = add_node(&node, graph, &params);
  if (error != cudaSuccess) return error;
  error = fill_body(params.conditional.phGraph_out[0], step, again, done, rows, limit);
  if (error != cudaSuccess) return error;
  return cudaGraphInstantiate(executable, graph, 0);
}

}  // namespace

const char* graph_loop_unsupported() {
  int driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver < kLeastDriver) return "the driver is older than CUDA 12.4";
  return nullptr;
}

int graph_loop_create(void* step, const uint8_t* done, int64_t rows, const int64_t* limit, GraphLoop* loop) {
  *loop = GraphLoop{nullptr, nullptr};
  cudaGraph_t graph = nullptr;
  cudaError_t error = cudaGraphCreate(&graph, 0);
  if (error != cudaSuccess) return error;
  cudaGraphExec_t executable = nullptr;
  error = build(graph, static_cast<cudaGraph_t>(step), done, rows, limit, &executable);
  if (error != cudaSuccess) {
    cudaGraphDestroy(graph);
    cudaGetLastError();  // reported by the return value: the next launch must not report it again
    return error;
  }
  *loop = GraphLoop{graph, executable};
  return cudaSuccess;
}

int graph_loop_launch(const GraphLoop& loop, void* stream) {
  return cudaGraphLaunch(static_cast<cudaGraphExec_t>(loop.executable), static_cast<cudaStream_t>(stream));
}

void graph_loop_destroy(GraphLoop* loop) {
  // Garbage collection may come here while a stream is captured. Destroying gives memory back, which invalidates a
  // capture unless this thread is in relaxed mode; nothing here has to do with what is captured.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  const bool exchanged = cudaThreadExchangeStreamCaptureMode(&mode) == cudaSuccess;
  if (loop->executable != nullptr) cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(loop->executable));
  if (loop->graph != nullptr) cudaGraphDestroy(static_cast<cudaGraph_t>(loop->graph));
  *loop = GraphLoop{nullptr, nullptr};
  if (exchanged) cudaThreadExchangeStreamCaptureMode(&mode);
}

#else

const char* graph_loop_unsupported() { return "the extension was compiled with a CUDA toolkit older than 12.4"; }
int graph_loop_create(void*, const uint8_t*, int64_t, const int64_t*, GraphLoop* loop) {
  *loop = GraphLoop{nullptr, nullptr};
  return cudaErrorNotSupported;
}
int graph_loop_launch(const GraphLoop&, void*) { return cudaErrorNotSupported; }
void graph_loop_destroy(GraphLoop*) {}

#endif

}  // namespace cuda
}  // namespace unmask
