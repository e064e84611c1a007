// The class unmask._C.GraphLoop, and whether there can be one.
#include "ops/graph_loop.h"

#include <pybind11/pybind11.h>

#include <string>

#include "checks.h"

namespace unmask {
namespace {

namespace py = pybind11;

#ifdef UNMASK_WITH_CUDA

// Addresses arrive as integers: a graph of torch.cuda.CUDAGraph.raw_cuda_graph(), tensors' data_ptr(), a stream's handle.
class Loop {
 public:
  Loop(uintptr_t step, uintptr_t done, int64_t rows, uintptr_t limit, int32_t device) : device_(device) {
    check(step != 0 && done != 0 && limit != 0 && rows > 0, "GraphLoop: expected a graph, flags of at least one row ",
          "and a limit, got an empty one");
    torch::stable::accelerator::DeviceGuard guard(device_);
    check_cuda(cuda::graph_loop_create(reinterpret_cast<void*>(step), reinterpret_cast<const uint8_t*>(done), rows,
                                       reinterpret_cast<const int64_t*>(limit), &loop_),
               "GraphLoop");
  }
  Loop(const Loop&) = delete;
  Loop& operator=(const Loop&) = delete;
  ~Loop() { cuda::graph_loop_destroy(&loop_); }

  void launch(uintptr_t stream) const {
    torch::stable::accelerator::DeviceGuard guard(device_);
    check_cuda(cuda::graph_loop_launch(loop_, reinterpret_cast<void*>(stream)), "GraphLoop.launch");
  }

 private:
  int32_t device_;
  cuda::GraphLoop loop_{nullptr, nullptr};
};

std::string unsupported() {
  const char* reason = cuda::graph_loop_unsupported();
  return reason == nullptr ? "" : reason;
}

#else

std::string unsupported() { return "the extension was built without CUDA"; }

#endif

}  // namespace

void bind_graph_loop(py::module_& module) {
  module.def("graph_loop_unsupported", &unsupported, "Why there can be no GraphLoop here; empty if there can be one.");
#ifdef UNMASK_WITH_CUDA
  py::class_<Loop>(module, "GraphLoop", "A captured step that the device repeats; see csrc/ops/graph_loop.h.")
      .def(py::init<uintptr_t, uintptr_t, int64_t, uintptr_t, int32_t>(), py::arg("step"), py::arg("done"),
           py::arg("rows"), py::arg("limit"), py::arg("device"), py::call_guard<py::gil_scoped_release>())
      .def("launch", &Loop::launch, py::arg("stream"), py::call_guard<py::gil_scoped_release>());
#endif
}

}  // namespace unmask
