// A captured denoising step, repeated by the device itself until enough rows are done.
//
// The loop is a CUDA graph with one WHILE node, whose body is a copy of the step's graph and a kernel that counts the
// rows still running. A launch runs the step at least once, and again as long as more than `*limit` of the `rows`
// flags in `done` are 0. Every pointer must stay valid as long as the loop, and so must all memory the step uses.
// The step may hold kernels, copies, fills and further graphs; anything else makes graph_loop_create fail.
#pragma once
#include <stdint.h>

namespace unmask {
namespace cuda {

struct GraphLoop {
  void* graph;       // cudaGraph_t
  void* executable;  // cudaGraphExec_t
};

// Why there can be no loop with this build and driver; null if there can be one.
const char* graph_loop_unsupported();

// `step` is a cudaGraph_t on the current device, which is copied. Returns a cudaError_t; on failure the loop is empty.
int graph_loop_create(void* step, const uint8_t* done, int64_t rows, const int64_t* limit, GraphLoop* loop);
int graph_loop_launch(const GraphLoop& loop, void* stream);
void graph_loop_destroy(GraphLoop* loop);

}  // namespace cuda
}  // namespace unmask
