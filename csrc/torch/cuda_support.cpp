// The two things the CUDA glue needs from the outside: torch's current stream, and names of CUDA errors.
#ifdef UNMASK_WITH_CUDA
#include "checks.h"

// Defined by libtorch_cuda; absent (null) where torch is a CPU build. Its header is for CUDA builds only.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

// From the CUDA runtime linked into this module; declared here because no CUDA header is needed otherwise.
extern "C" const char* cudaGetErrorString(int error);

namespace unmask {

void* current_stream(const Tensor& t) {
  check(&aoti_torch_get_current_cuda_stream != nullptr, "this torch was built without CUDA");
  void* stream = nullptr;
  check(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream) == 0, "torch gave no current CUDA stream");
  return stream;
}

void check_cuda(int code, const char* op) {
  check(code == 0, op, ": CUDA error ", code, " (", cudaGetErrorString(code), ")");
}

}  // namespace unmask
#endif
