// What the glue of every op needs: argument checks, memory of tensors, and CUDA's stream, on torch's stable ABI.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

// Defined by libtorch_cuda; absent (null) where torch is a CPU build. Its header is for CUDA builds only.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
// From the CUDA runtime linked into this module; declared here because no CUDA header is needed otherwise.
extern "C" const char* cudaGetErrorString(int error);

namespace unmask {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Shape = torch::headeronly::IntHeaderOnlyArrayRef;
struct Device {
  const Tensor& tensor;
};

// Parts of messages, written out only if the message is.
inline std::ostream& operator<<(std::ostream& text, Shape shape) {
  text << '(';
  for (size_t i = 0; i < shape.size(); ++i) text << (i ? ", " : "") << shape[i];
  return text << (shape.size() == 1 ? ",)" : ")");
}
inline std::ostream& operator<<(std::ostream& text, const Device& device) {
  if (device.tensor.is_cpu()) return text << "cpu";
  return text << "cuda:" << static_cast<int>(device.tensor.get_device_index());
}

// Throws std::runtime_error with the parts put together, unless the condition holds. What is thrown becomes a
// RuntimeError in Python; unmask/ops/library.py makes of it the type that the message begins with.
template <typename... Parts>
void check(bool condition, const Parts&... parts) {
  if (__builtin_expect(condition, 1)) return;
  std::ostringstream message;
  message << "unmask: ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// A number that is not what is `expected`.
template <typename Got>
void check_value(bool condition, const char* name, const Got& got, const char* expected) {
  check(condition, "ValueError: ", name, ": expected ", expected, ", got ", got);
}

inline const char* dtype_name(ScalarType dtype) {
  constexpr std::pair<ScalarType, const char*> kNames[] = {
      {ScalarType::Bool, "bool"},     {ScalarType::Int, "int32"},         {ScalarType::Long, "int64"},
      {ScalarType::Half, "float16"},  {ScalarType::BFloat16, "bfloat16"}, {ScalarType::Float, "float32"},
      {ScalarType::Double, "float64"}};
  for (const auto& [value, name] : kNames) {
    if (value == dtype) return name;
  }
  return "another dtype";
}

// The dtype of tensors whose elements the kernels see as T.
template <typename T>
inline constexpr ScalarType kDTypeOf = std::is_same_v<T, uint8_t>   ? ScalarType::Bool
                                       : std::is_same_v<T, int32_t> ? ScalarType::Int
                                       : std::is_same_v<T, int64_t> ? ScalarType::Long
                                                                    : ScalarType::Float;

// The tensors of one call, all on the device of `like`: those read are kept until the object goes.
class Arguments {
 public:
  explicit Arguments(const Tensor& like_) : like(like_) { kept.reserve(16); }

  void check_tensor(const Tensor& t, ScalarType dtype, const char* name, Shape shape) const {
    check(t.scalar_type() == dtype, "TypeError: ", name, ": expected ", dtype_name(dtype), ", got ",
          dtype_name(t.scalar_type()));
    check(t.sizes() == shape, "ValueError: ", name, ": expected shape ", shape, ", got ", t.sizes());
    check(t.is_cpu() == like.is_cpu() && (t.is_cpu() || t.get_device_index() == like.get_device_index()),
          "ValueError: ", name, ": expected device ", Device{like}, ", got ", Device{t});
  }
  template <typename T>
  void check_tensor(const Tensor& t, const char* name, Shape shape) const {
    check_tensor(t, kDTypeOf<T>, name, shape);
  }

  // The elements, contiguous: of a copy only if the tensor's are not.
  template <typename T>
  const T* read(const Tensor& t, const char* name, Shape shape) {
    check_tensor<T>(t, name, shape);
    kept.push_back(t.is_contiguous() ? t : torch::stable::contiguous(t));
    return static_cast<const T*>(kept.back().const_data_ptr());
  }
  // The same, or null where there is no tensor.
  template <typename T>
  const T* read(const OptionalTensor& t, const char* name, Shape shape) {
    return t.has_value() ? read<T>(*t, name, shape) : nullptr;
  }

  // The elements of a tensor that is written in place.
  void* write(const Tensor& t, ScalarType dtype, const char* name, Shape shape) const {
    check_tensor(t, dtype, name, shape);
    check_value(t.is_contiguous(), name, t.strides(), "a contiguous tensor, as it is written in place");
    return t.mutable_data_ptr();
  }
  template <typename T>
  T* write(const Tensor& t, const char* name, Shape shape) const {
    return static_cast<T*>(write(t, kDTypeOf<T>, name, shape));
  }

  // The seed of draws, of shape () or (1,); null where nothing is drawn.
  const int64_t* read_seed(const OptionalTensor& seed, bool drawing) {
    check(seed.has_value() || !drawing, "TypeError: seed: expected an int64 tensor for draws, got None");
    if (!drawing) return nullptr;
    return seed->dim() == 0 ? read<int64_t>(*seed, "seed", {}) : read<int64_t>(*seed, "seed", {1});
  }

 private:
  const Tensor& like;
  std::vector<Tensor> kept;
};

// Uninitialised contiguous tensor on the device of `reference`.
inline Tensor allocate(Shape sizes, ScalarType dtype, const Tensor& reference) {
  return torch::stable::new_empty(reference, sizes, dtype);
}

template <typename T>
T* write(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Rows per task such that a task is worth handing to another thread: about 32k elementary operations.
inline int64_t grain_size(int64_t work_per_row) {
  constexpr int64_t kWorkPerTask = 32768;
  const int64_t rows = kWorkPerTask / (work_per_row > 0 ? work_per_row : 1);
  return rows > 0 ? rows : 1;
}

// For code that launches CUDA kernels: makes the device of `t` the current one as long as the result lives.
template <bool kCuda>
auto device_scope(const Tensor& t) {
  if constexpr (kCuda)
    return torch::stable::accelerator::DeviceGuard(t.get_device_index());
  else
    return 0;
}

// The stream torch is using on the device of `t`, as a cudaStream_t.
inline void* current_stream(const Tensor& t) {
  check(&aoti_torch_get_current_cuda_stream != nullptr, "this torch was built without CUDA");
  void* stream = nullptr;
  check(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream) == 0, "torch gave no current CUDA stream");
  return stream;
}
// Throws if a launch returned anything but cudaSuccess.
inline void check_cuda(int code, const char* op) {
  check(code == 0, op, ": CUDA error ", code, " (", cudaGetErrorString(code), ")");
}
// Scratch memory of a launch, freed (in stream order, by torch's allocator) when the tensor goes.
inline Tensor workspace(int64_t bytes, const Tensor& reference) {
  return allocate({bytes > 0 ? bytes : 1}, ScalarType::Byte, reference);
}

}  // namespace unmask
