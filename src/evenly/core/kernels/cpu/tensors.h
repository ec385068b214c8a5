// Tensors at the border with Python: what memory they have, without a PyTorch header. PyTorch says it through DLPack's
// C interface (from 2.10); before, a tensor is asked for its `data_ptr()`.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "problem.h"

namespace evenly {

namespace nb = nanobind;

using View = nb::dlpack::dltensor;

// The table behind `torch.Tensor.__dlpack_c_exchange_api__`, as DLPack 1.x lays it out.
struct Exchange {
  uint32_t major, minor;
  void* previous;
  void *allocate, *export_tensor, *import_tensor;
  int (*view)(void* tensor, View* out);  // may be null
  void* stream;
};

inline PyObject* checked(PyObject* object) {
  if (!object) nb::raise_python_error();
  return object;
}

template <class... A>
nb::object called(PyObject* function, const A&... arguments) {
  PyObject* list[] = {nullptr, arguments.ptr()...};
  constexpr size_t count = sizeof...(A) | PY_VECTORCALL_ARGUMENTS_OFFSET;
  return nb::steal(checked(PyObject_Vectorcall(function, list + 1, count, nullptr)));
}

inline PyObject* interned(const char* name) { return PyUnicode_InternFromString(name); }

inline decltype(Exchange::view) find_view() {
  PyObject* torch = PyImport_ImportModule("torch");
  PyObject* type = torch ? PyObject_GetAttrString(torch, "Tensor") : nullptr;
  PyObject* capsule = type ? PyObject_GetAttrString(type, "__dlpack_c_exchange_api__") : nullptr;
  auto* table = capsule ? static_cast<Exchange*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api")) : nullptr;
  Py_XDECREF(capsule), Py_XDECREF(type), Py_XDECREF(torch);
  PyErr_Clear();
  return table && table->major == 1 ? table->view : nullptr;
}

inline decltype(Exchange::view) view_of_torch() {
  static const auto found = find_view();
  return found;
}

// Memory, shape and strides of a tensor, for as long as it lives unchanged.
inline bool look(nb::handle tensor, View& view) noexcept {
  const auto read = view_of_torch();
  if (read && read(tensor.ptr(), &view) == 0) return true;
  PyErr_Clear();
  return false;
}

// One of the dtypes of the kernels; -1: another.
inline int dtype_of(const View& v) {
  constexpr uint8_t floating = 2, brain = 4;
  if (v.dtype.lanes != 1) return -1;
  if (v.dtype.code == brain && v.dtype.bits == 16) return BF16;
  if (v.dtype.code != floating) return -1;
  return v.dtype.bits == 32 ? F32 : v.dtype.bits == 64 ? F64 : v.dtype.bits == 16 ? F16 : -1;
}

inline bool on_cpu(const View& v) { return v.device.device_type == 1; }

inline void* memory_of(const View& v) { return static_cast<char*>(v.data) + v.byte_offset; }

// The memory of a tensor; null for None.
struct Memory {
  void* at = nullptr;
  explicit operator bool() const { return at != nullptr; }
};

inline bool memory_of(nb::handle tensor, Memory& memory) noexcept {
  if (tensor.is_none()) return true;
  View view;
  if (look(tensor, view)) {
    memory.at = memory_of(view);
    return true;
  }
  static PyObject* const data_ptr = interned("data_ptr");
  PyObject* address = PyObject_CallMethodNoArgs(tensor.ptr(), data_ptr);
  if (address) memory.at = PyLong_AsVoidPtr(address);
  Py_XDECREF(address);
  const bool fine = !PyErr_Occurred();
  PyErr_Clear();
  return fine;
}

// An argument as it is, None included.
struct Object : nb::handle {};

}  // namespace evenly

namespace nanobind::detail {

template <>
struct has_arg_defaults<evenly::Memory> : std::true_type {};  // None is taken
template <>
struct has_arg_defaults<evenly::Object> : std::true_type {};

template <>
struct type_caster<evenly::Memory> {
  NB_TYPE_CASTER(evenly::Memory, const_name("torch.Tensor"))
  bool from_python(handle tensor, uint8_t, cleanup_list*) noexcept { return evenly::memory_of(tensor, value); }
  static handle from_cpp(evenly::Memory, rv_policy, cleanup_list*) noexcept = delete;
};

template <>
struct type_caster<evenly::Object> {
  NB_TYPE_CASTER(evenly::Object, const_name("object"))
  bool from_python(handle object, uint8_t, cleanup_list*) noexcept {
    value = evenly::Object{object};
    return true;
  }
  static handle from_cpp(evenly::Object object, rv_policy, cleanup_list*) noexcept { return object.inc_ref(); }
};

}  // namespace nanobind::detail
