// Eager calls of map on plain torch tensors: outputs of a row, or random numbers alone.
#pragma once

#include "coefficients.h"
#include "results.h"

namespace genkern {

inline bool launch_map(const MapArgs& args, const View& like) {
  return without_lock(like, [&] { return torch_side().launcher->map(args, like.device.cuda, like.device.index); });
}

// New outputs, one of each dtype code.
inline py::object map_to_new(Terms& t, const std::vector<int>& codes) {
  py::object outs = py::reinterpret_steal<py::object>(PyTuple_New(static_cast<Py_ssize_t>(codes.size())));
  const int like_code = dtype_code(t.like_view.element);
  for (size_t j = 0; j < codes.size(); ++j) {
    PyObject* out = empty_like(t.like, like_code, codes[j]).release().ptr();
    if (out == nullptr) return {};
    PyTuple_SET_ITEM(outs.ptr(), static_cast<Py_ssize_t>(j), out);
    View view;
    if (!fresh_view(out, view)) return {};
    t.call.out.push_back(view);
  }
  return launch_map(make_args(t.call), t.like_view) ? outs : py::object();
}

// The given outputs as a tuple, their views in the call; null where one is not plain, or of another dtype.
inline py::object set_outputs(PyObject* out, const std::vector<int>& codes, Call& call) {
  py::object outs = py::reinterpret_steal<py::object>(
      PyTuple_CheckExact(out) || PyList_CheckExact(out) ? PySequence_Tuple(out) : PyTuple_Pack(1, out));
  if (!outs || PyTuple_GET_SIZE(outs.ptr()) != static_cast<Py_ssize_t>(codes.size())) return {};
  const bool with_gradients = grad_enabled();
  for (size_t j = 0; j < codes.size(); ++j) {
    PyObject* const one = PyTuple_GET_ITEM(outs.ptr(), static_cast<Py_ssize_t>(j));
    View view;
    if (!plain_view(one, view) || dtype_code(view.element) != codes[j]) return {};
    if (with_gradients && requires_grad(one)) return {};
    call.out.push_back(view);
  }
  return outputs_certainly_apart(call) ? outs : py::object();
}

inline bool count_version(const py::object& outs) {
  return static_cast<bool>(
      py::reinterpret_steal<py::object>(PyObject_CallOneArg(torch_side().increment_version, outs.ptr())));
}

inline bool read_codes(PyObject* dtypes, size_t n_out, int like_code, std::vector<int>& codes) {
  if (like_code < 0) return false;
  codes.assign(n_out, like_code);
  if (dtypes == Py_None) return true;
  if (!PyTuple_CheckExact(dtypes) && !PyList_CheckExact(dtypes)) return false;
  if (PySequence_Fast_GET_SIZE(dtypes) != static_cast<Py_ssize_t>(n_out)) return false;
  for (size_t j = 0; j < n_out; ++j) {
    codes[j] = dtype_code(PySequence_Fast_GET_ITEM(dtypes, static_cast<Py_ssize_t>(j)));
    if (codes[j] < 0) return false;
  }
  return true;
}

// The outputs of a call whose terms and row are set: new ones, or those given.
inline py::object mapped(Terms& t, const std::vector<int>& codes, PyObject* out) {
  const bool gradients = grad_enabled() && t.wants_gradient();
  if (out == Py_None) {
    if (!gradients) return map_to_new(t, codes);
    // The formula's path values get their gradients from torch (coefficients.py).
    if (t.call.formula != 0 && t.values_want_gradient()) return {};
    const py::object outs = map_to_new(t, codes);
    return outs ? differentiable(answers().map_function, t, codes, 0, Py_False, outs, false) : py::object();
  }
  if (gradients || t.z_unread) return {};
  py::object outs = set_outputs(out, codes, t.call);
  if (!outs) return {};
  const MapArgs args = make_args(t.call);
  // Counted between the checks and the kernel: no error may follow what is written.
  return count_version(outs) && launch_map(args, t.like_view) ? outs : py::object();
}

// map_row(row, x, m, m_uncond, h, noise, out, dtypes, draw): fused.apply_row of tensors, or None.
inline PyObject* map_row(PyObject*, PyObject* const* given, Py_ssize_t n) {
  return answer([&]() -> py::object {
    if (n != 9 || !undisturbed()) return {};
    Terms t;
    if (!set_terms(given[1], given[2], given[3], given[4], given[5], t)) return {};
    if (!set_row(given[0], given[5], PyLong_AsLong(given[8]), t)) return {};
    std::vector<int> codes;
    if (!read_codes(given[7], t.n_out, dtype_code(t.like_view.element), codes)) return {};
    return mapped(t, codes, given[6]);
  });
}

// Outputs of the state's own dtype: one alone, or a tuple of two.
inline py::object mapped_like(Terms& t, PyObject* out) {
  const int code = dtype_code(t.like_view.element);
  if (code < 0) return {};
  const py::object outs = mapped(t, std::vector<int>(t.n_out, code), out);
  if (!outs || t.n_out > 1) return outs;
  return py::reinterpret_borrow<py::object>(PyTuple_GET_ITEM(outs.ptr(), 0));
}

// linear(x, m, m_uncond, h, noise, out, c_x, c_m, c_h, c_z, guidance, factor, low): the output
// c_x x + factor (c_m m + sum_k c_hk h_k) + c_z z of tensors, its row made and its coefficients checked here, or None.
// factor and low are floats, low the least that a coefficient may be. A term that an op has not has the coefficient 0.
inline PyObject* linear(PyObject*, PyObject* const* given, Py_ssize_t n) {
  return answer([&]() -> py::object {
    if (n != 13 || given[0] == Py_None || !undisturbed()) return {};
    const double factor = PyFloat_AsDouble(given[11]), low = PyFloat_AsDouble(given[12]);
    CheckedRow row;
    Terms t;
    if (!row.set(kFirstOut + kOutX, given[6], 1.0, low) || !row.set_guidance(given[10], given[2]) ||
        !row.set(kFirstOut + kOutM, given[7], factor, low) || !row.set_h(given[8], given[3], factor, low) ||
        !row.set(kFirstOut + kOutZ, given[9], 1.0, low) ||
        !row.into(t, given[0], given[1], given[2], given[3], given[4])) {
      return {};
    }
    return mapped_like(t, given[5]);
  });
}

// ddim(x, m, m_uncond, noise, out, prediction, alpha_t, sigma_t, alpha_s, sigma_s, eta, clip, guidance, return_pred):
// ops.ddim_step of tensors, its row made and its coefficients checked here, or None.
inline PyObject* ddim(PyObject*, PyObject* const* given, Py_ssize_t n) {
  return answer([&]() -> py::object {
    if (n != 14 || given[0] == Py_None || given[1] == Py_None || !undisturbed()) return {};
    static PyObject* const no_h = PyTuple_New(0);
    CheckedRow row;
    Terms t;
    if (!row.set_ddim(given[5], given + 6, given[11], given[13]) || !row.set_guidance(given[12], given[2]) ||
        !row.into(t, given[0], given[1], given[2], no_h, given[3])) {
      return {};
    }
    return mapped_like(t, given[4]);
  });
}

// map_numbers(numbers, out, tensors): calls.run_ready, True, or None.
inline PyObject* map_numbers(PyObject*, PyObject* const* given, Py_ssize_t n) {
  return answer([&]() -> py::object {
    if (n != 3 || !undisturbed()) return {};
    Terms t;
    int64_t kind = 0;
    if (!set_laid_out(given[0], given[2], t, kind) || (grad_enabled() && t.wants_gradient())) return {};
    PyObject* const out = given[1];
    if (!PyTuple_CheckExact(out) && !PyList_CheckExact(out)) return {};
    for (Py_ssize_t j = 0; j < PySequence_Fast_GET_SIZE(out); ++j) {
      View view;
      if (!plain_view(PySequence_Fast_GET_ITEM(out, j), view)) return {};
      t.call.out.push_back(view);
    }
    if (!outputs_certainly_apart(t.call)) return {};
    return launch_map(make_args(t.call), like_of(t.call)) ? py::bool_(true) : py::object();
  });
}

inline bool is_shape(PyObject* shape) {
  if (!PyTuple_Check(shape) && !PyList_CheckExact(shape)) return false;
  for (Py_ssize_t d = 0; d < PySequence_Fast_GET_SIZE(shape); ++d)
    if (!PyLong_CheckExact(PySequence_Fast_GET_ITEM(shape, d))) return false;
  return true;
}

inline bool has_shape(const View& view, PyObject* shape) {
  if (PySequence_Fast_GET_SIZE(shape) != view.ndim) return false;
  for (int32_t d = 0; d < view.ndim; ++d)
    if (PyLong_AsLongLong(PySequence_Fast_GET_ITEM(shape, d)) != view.sizes[d]) return false;
  return true;
}

// draw(shape, noise, device, dtype, out, kind): random numbers alone, or None.
inline PyObject* draw(PyObject*, PyObject* const* given, Py_ssize_t n) {
  return answer([&]() -> py::object {
    if (n != 6 || !undisturbed()) return {};
    PyObject *const shape = given[0], *const noise = given[1], *const device = given[2], *const dtype = given[3];
    if (!is_noise(noise) || !is_shape(shape) || (dtype != Py_None && dtype_code(dtype) < 0)) return {};
    Terms t;
    if (!set_noise_value(noise, PyLong_AsLong(given[5]), t)) return {};
    t.call.row.assign(kFirstOut + kOutCells, 0.0);
    t.call.row[kLo] = -kInfinity, t.call.row[kHi] = kInfinity, t.call.row[kW] = 1.0;
    t.call.row[kFirstOut + kOutZ] = 1.0;
    const bool is_given = given[4] != Py_None;
    if (is_given && device != Py_None) return {};
    py::object out = is_given ? py::reinterpret_borrow<py::object>(given[4]) : empty(shape, dtype, device);
    View view;
    if (!out || !plain_view(out.ptr(), view) || !has_shape(view, shape)) return {};
    const int code = dtype_code(view.element);
    if (code < 0 || (dtype != Py_None && dtype_code(dtype) != code)) return {};
    if (is_given && grad_enabled() && requires_grad(out.ptr())) return {};
    t.call.out.push_back(view);
    const MapArgs args = make_args(t.call);
    if (is_given && !count_version(py::make_tuple(out))) return {};
    return launch_map(args, view) ? out : py::object();
  });
}

}  // namespace genkern
