// What the glue of every op needs: argument checks, allocation, and the current CUDA stream, on torch's stable ABI.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace unmask {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Throws std::runtime_error (a RuntimeError in Python) with the parts put together, unless the condition holds.
template <typename... Parts>
void check(bool condition, const Parts&... parts) {
  if (__builtin_expect(condition, 1)) return;
  std::ostringstream message;
  message << "unmask: ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// A shape as a part of a message, written out only if the message is.
struct Shape {
  const int64_t* sizes;
  size_t count;
};

inline Shape shape_text(const Tensor& t) { return Shape{t.sizes().data(), static_cast<size_t>(t.dim())}; }

inline std::ostream& operator<<(std::ostream& text, const Shape& shape) {
  text << '(';
  for (size_t i = 0; i < shape.count; ++i) text << (i ? ", " : "") << shape.sizes[i];
  return text << ')';
}

inline void check_dtype(const Tensor& t, ScalarType expected, const char* name, const char* dtype_name) {
  check(t.scalar_type() == expected, name, ": expected dtype ", dtype_name);
}

inline void check_shape(const Tensor& t, std::initializer_list<int64_t> expected, const char* name) {
  bool same = t.dim() == static_cast<int64_t>(expected.size());
  int64_t axis = 0;
  for (int64_t size : expected) same = same && t.size(axis++) == size;
  check(same, name, ": expected shape ", Shape{expected.begin(), expected.size()}, ", got ", shape_text(t));
}

inline void check_same_device(const Tensor& t, const Tensor& reference, const char* name) {
  check(t.is_cpu() == reference.is_cpu() && (t.is_cpu() || t.get_device_index() == reference.get_device_index()), name,
        ": must be on the same device as the other tensors");
}

inline void check_contiguous(const Tensor& t, const char* name) {
  check(t.is_contiguous(), name, ": is written in place and must be contiguous");
}

// A contiguous tensor of the given dtype and number of elements on the device of `reference`; copies only if needed.
inline Tensor prepared(const Tensor& t, ScalarType dtype, int64_t count, const Tensor& reference, const char* name,
                       const char* dtype_name) {
  check_dtype(t, dtype, name, dtype_name);
  check(t.numel() == count, name, ": expected ", count, " elements, got shape ", shape_text(t));
  check_same_device(t, reference, name);
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// Uninitialised contiguous tensor on the device of `reference`.
inline Tensor allocate(const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& reference) {
  return torch::stable::new_empty(
      reference, torch::headeronly::IntHeaderOnlyArrayRef(sizes.data(), sizes.size()), dtype);
}

template <typename T>
const T* read(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <typename T>
T* write(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

template <typename T>
const T* read_or_null(const OptionalTensor& t) {
  return t.has_value() ? read<T>(*t) : nullptr;
}

// Rows per task such that a task is worth handing to another thread: about 32k elementary operations.
inline int64_t grain_size(int64_t work_per_row) {
  constexpr int64_t kWorkPerTask = 32768;
  const int64_t rows = kWorkPerTask / (work_per_row > 0 ? work_per_row : 1);
  return rows > 0 ? rows : 1;
}

#ifdef UNMASK_WITH_CUDA
// The stream torch is using on the device of `t`, as a cudaStream_t.
void* current_stream(const Tensor& t);
// Throws if a launch returned anything but cudaSuccess.
void check_cuda(int code, const char* op);
// Scratch memory of a launch, freed (in stream order, by torch's allocator) when the tensor goes.
inline Tensor workspace(int64_t bytes, const Tensor& reference) {
  return allocate({bytes > 0 ? bytes : 1}, ScalarType::Byte, reference);
}
#endif

}  // namespace unmask
