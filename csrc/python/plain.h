// Plain torch tensors, seen without torch's headers: exactly torch.Tensor or torch.nn.Parameter, whose memory is
// borrowed through DLPack's C exchange API, while nothing watches or transforms what eager code does.
//
// The raw C API of Python where a call's time is made of such steps: one of pybind11's costs some 0.1 us.
#pragma once

#include <pybind11/pybind11.h>

#include <array>

#include "../faces/launch.h"
#include "views.h"

namespace genkern {

inline PyObject* interned(const char* name) { return PyUnicode_InternFromString(name); }

// What genkern/eager.py hands over; references are kept as long as the process lives.
struct Torch {
  PyObject *tensor = nullptr, *parameter = nullptr;  // types
  PyObject *row = nullptr, *out = nullptr, *ddim_row = nullptr, *scaled = nullptr, *noise = nullptr;
  std::array<PyObject*, 4> dtypes{};  // by their code
  PyObject *empty = nullptr, *empty_like = nullptr, *empty_strided = nullptr, *is_neg = nullptr,
           *increment_version = nullptr;
  // Of what may watch or transform a call: each gives None, or 0.
  PyObject *functorch = nullptr, *tracing = nullptr, *dispatch_modes = nullptr, *function_modes = nullptr;
  PyObject* forward_levels = nullptr;  // the module torch.autograd.forward_ad
  PyObject* grad_enabled = nullptr;
  PyObject* debug = nullptr;  // gk.debug
  const dlpack::ExchangeApi* api = nullptr;
  const Launcher* launcher = nullptr;
};

inline Torch& torch_side() {
  static Torch torch;
  return torch;
}

inline py::object call_without_arguments(PyObject* function) {
  return py::reinterpret_steal<py::object>(PyObject_CallNoArgs(function));
}

inline py::object attribute(PyObject* object, PyObject* name) {
  return py::reinterpret_steal<py::object>(PyObject_GetAttr(object, name));
}

// Whether eager code runs as it is written: no transform of torch.func, no forward-mode level, no dispatch or function
// mode, no tracer. (torch.compile is asked for in Python, where it sees the answer.)
inline bool undisturbed() {
  const Torch& torch = torch_side();
  static PyObject* const level = interned("_current_level");
  for (PyObject* none : {torch.functorch, torch.tracing}) {
    const py::object found = call_without_arguments(none);
    if (found.ptr() != Py_None) return false;
  }
  for (PyObject* zero : {torch.dispatch_modes, torch.function_modes}) {
    const py::object found = call_without_arguments(zero);
    if (!found || PyLong_AsLong(found.ptr()) != 0) return false;
  }
  const py::object found = attribute(torch.forward_levels, level);
  return found && PyLong_AsLong(found.ptr()) < 0;
}

inline bool is_plain(PyObject* object) {
  const Torch& torch = torch_side();
  const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  return type == torch.tensor || type == torch.parameter;
}

// The view of a plain tensor, which it points into; false where it is anything else.
inline bool fresh_view(PyObject* object, View& view) {
  if (!is_plain(object)) return false;
  dlpack::Tensor tensor{};
  if (torch_side().api->tensor_from_object(object, &tensor) != 0) return false;
  if (tensor.strides == nullptr && tensor.ndim != 0) return false;
  view.device.cuda = tensor.device.type == dlpack::kCuda;
  if (!view.device.cuda && tensor.device.type != dlpack::kCpu && tensor.device.type != dlpack::kCudaHost) return false;
  view.device.index = view.device.cuda ? tensor.device.id : 0;
  view.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  view.element = dlpack_element(tensor.dtype);
  view.ndim = tensor.ndim;
  view.sizes = tensor.shape;
  view.strides = tensor.strides;
  if (tensor.data == nullptr && view.numel() != 0) return false;  // a wrapper, or zeros without memory
  return view.element != Element::other;
}

// The same of a tensor that the caller made: its memory must be as it reads, not to be negated first.
inline bool plain_view(PyObject* object, View& view) {
  if (!fresh_view(object, view)) return false;
  if (view.element == Element::boolean || view.element == Element::int64) return true;
  const py::object negative = py::reinterpret_steal<py::object>(PyObject_CallOneArg(torch_side().is_neg, object));
  return negative.ptr() == Py_False;
}

inline bool grad_enabled() { return call_without_arguments(torch_side().grad_enabled).ptr() != Py_False; }

// gk.debug(values=True), which asks for the values of device tensors.
inline bool looks_at_device_values() {
  static PyObject* const name = interned("values");
  return attribute(torch_side().debug, name).ptr() != Py_False;
}

inline bool requires_grad(PyObject* tensor) {
  static PyObject* const name = interned("requires_grad");
  return attribute(tensor, name).ptr() != Py_False;
}

// 0 to 3; -1 where it is none of the four dtypes.
inline int dtype_code(PyObject* dtype) {
  for (int code = 0; code < 4; ++code)
    if (torch_side().dtypes[code] == dtype) return code;
  return -1;
}

inline int dtype_code(Element element) {
  switch (element) {
    case Element::f32: return 0;
    case Element::f16: return 1;
    case Element::bf16: return 2;
    case Element::f64: return 3;
    default: return -1;
  }
}

// torch.empty_like(like, dtype=dtype): a dense tensor's strides are kept.
inline py::object empty_like(PyObject* like, int like_code, int code) {
  const Torch& torch = torch_side();
  if (code == like_code) return py::reinterpret_steal<py::object>(PyObject_CallOneArg(torch.empty_like, like));
  static PyObject* const names = PyTuple_Pack(1, interned("dtype"));
  PyObject* const arguments[] = {like, torch.dtypes[code]};
  return py::reinterpret_steal<py::object>(PyObject_Vectorcall(torch.empty_like, arguments, 1, names));
}

// torch.empty(shape, dtype=dtype, device=device); dtype and device may be None.
inline py::object empty(PyObject* shape, PyObject* dtype, PyObject* device) {
  static PyObject* const names = PyTuple_Pack(2, interned("dtype"), interned("device"));
  PyObject* const arguments[] = {shape, dtype, device};
  return py::reinterpret_steal<py::object>(PyObject_Vectorcall(torch_side().empty, arguments, 1, names));
}

// like.new_empty(rows, 2, dtype=dtype): sizes one by one, as a tuple of them costs half a microsecond more.
inline py::object new_pairs(PyObject* like, int64_t rows, PyObject* dtype) {
  static PyObject *const method = interned("new_empty"), *const two = PyLong_FromLong(2);
  static PyObject* const names = PyTuple_Pack(1, interned("dtype"));
  const auto count = py::reinterpret_steal<py::object>(PyLong_FromLongLong(rows));
  PyObject* const arguments[] = {like, count.ptr(), two, dtype};
  return py::reinterpret_steal<py::object>(PyObject_VectorcallMethod(method, arguments, 3, names));
}

// A new 0-d tensor: torch.empty_strided, which is quicker than torch.empty. Where nothing disturbs (another default
// device would), the CPU is the default.
inline py::object new_scalar(PyObject* like, bool on_cuda, PyObject* dtype) {
  static PyObject *const device_name = interned("device"), *const nothing = PyTuple_New(0);
  if (!on_cuda) {
    static PyObject* const names = PyTuple_Pack(1, interned("dtype"));
    PyObject* const arguments[] = {nothing, nothing, dtype};
    return py::reinterpret_steal<py::object>(PyObject_Vectorcall(torch_side().empty_strided, arguments, 2, names));
  }
  static PyObject* const names = PyTuple_Pack(2, interned("dtype"), interned("device"));
  const py::object device = attribute(like, device_name);
  PyObject* const arguments[] = {nothing, nothing, dtype, device.ptr()};
  return py::reinterpret_steal<py::object>(PyObject_Vectorcall(torch_side().empty_strided, arguments, 2, names));
}

}  // namespace genkern
