// Eager calls of reduce on plain torch tensors: a residual and its sums, and losses of a batch.
#pragma once

#include <algorithm>

#include "coefficients.h"
#include "results.h"

namespace genkern {

// A reduction's arguments but for the sums, and its new residual, in m's dtype; null where something is not plain.
inline py::object set_residual(Terms& t, int64_t kind, ReduceArgs& args) {
  const int like_code = dtype_code(t.like_view.element);
  const int code = t.call.m ? dtype_code(t.call.m->element) : like_code;
  if (like_code < 0 || code < 0 || kind < 0 || kind > 1) return {};
  py::object residual = empty_like(t.like, like_code, code);
  View view;
  if (!residual || !fresh_view(residual.ptr(), view)) return {};
  t.call.out.push_back(view);
  args.map = make_args(t.call);
  args.rho = static_cast<Rho>(kind);
  return residual;
}

inline PyObject* arithmetic(const ReduceArgs& args) { return torch_side().dtypes[args.map.f64 ? 3 : 0]; }

// The terms, the mask and the row of a reduction; whether a gradient is asked for.
inline bool set_reduction(PyObject* const* given, Terms& t, bool& gradients) {
  PyObject* const noise = given[5];
  if (!undisturbed() || !set_terms(given[1], given[2], given[3], given[4], noise, t)) return false;
  if (!add_view(given[6], t.mask, t.call.mask)) return false;
  if (t.call.mask && t.call.mask->element != Element::boolean) return false;  // numbers are looked at in Python
  if (!set_row(given[0], noise, 1, t) || t.n_out != 1) return false;
  gradients = grad_enabled() && t.wants_gradient();
  return !gradients || t.call.formula == 0 || !t.values_want_gradient();
}

// reduce_row(row, x, m, m_uncond, h, noise, mask, kind, scratch): fused.reduce_row of tensors, or None.
inline PyObject* reduce_row(PyObject*, PyObject* const* given, Py_ssize_t n) {
  return answer([&]() -> py::object {
    Terms t;
    bool gradients = false;
    if (n != 9 || !set_reduction(given, t, gradients)) return {};
    const int64_t kind = PyLong_AsLong(given[7]);
    ReduceArgs args;
    const py::object residual = set_residual(t, kind, args);
    if (!residual) return {};
    const py::object sums = new_pairs(t.like, args.map.sizes[0], arithmetic(args));
    View view;
    if (!sums || !fresh_view(sums.ptr(), view)) return {};
    args.sums = view.data;
    const View& like = t.like_view;
    if (!without_lock(like, [&] { return torch_side().launcher->reduce(args, like.device.cuda, like.device.index); })) {
      return {};
    }
    const py::object results = py::make_tuple(residual, sums);
    return gradients ? differentiable(answers().reduce_function, t, {}, kind, given[8], results, true) : results;
  });
}

// A number a sample that is no part of the graph; one whose gradient is asked for goes elsewhere.
inline bool set_weight(PyObject* weight, const View& like, Value& to) {
  if (weight == Py_None) return true;
  View view;
  if (!plain_view(weight, view) || (grad_enabled() && requires_grad(weight))) return false;
  if (view.element != Element::f32 && view.element != Element::f64) return false;
  const int64_t count = view.numel();
  if (view.ndim != 1 || !view.contiguous() || (count != 1 && count != like.sizes[0])) return false;
  expect_device(view, like, "weight");
  to = {view.data, floating(view, "weight"), count == 1 ? 0 : 1, 0, 1.0};
  return true;
}

// A reduction of which the total alone is wanted: of a residual that is not written.
inline bool set_unwritten(Terms& t, int64_t kind, ReduceArgs& args) {
  if (kind < 0 || kind > 1 || dtype_code(t.like_view.element) < 0) return false;
  args.map = make_args(t.call, 1);
  args.rho = static_cast<Rho>(kind);
  return true;
}

// Whether m alone wants a gradient, and it is the residual times m's coefficient.
inline bool wants_of_m_alone(const Terms& t) {
  if (t.m == nullptr || !requires_grad(t.m) || keeps(t) == kAll) return false;
  for (PyObject* other : {t.x, t.z, t.h[0], t.h[1], t.h[2]})
    if (other != nullptr && requires_grad(other)) return false;
  return true;
}

// m's coefficient is in the residual: 1 is what is left of it.
inline void without_coefficient_of_m(Terms& t) {
  constexpr int64_t kCell = kFirstOut + kOutM;
  t.call.row[kCell] = 1.0;
  const auto at = std::find(t.call.cells.begin(), t.call.cells.end(), kCell);
  if (at == t.call.cells.end()) return;
  const auto k = at - t.call.cells.begin();
  t.call.cells.erase(at);
  t.call.scales.erase(t.call.scales.begin() + k);
  t.call.values.erase(t.call.values.begin() + k);
  t.values.erase(t.values.begin() + k);
}

// scale times the weighted sum over all samples of what reduce_row sums, of a call whose terms and row are set.
inline py::object summed_loss(Terms& t, bool gradients, int64_t kind, double scale, PyObject* weight) {
  ReduceArgs args;
  args.total_scale = scale;
  const View& like = t.like_view;
  if (!set_weight(weight, like, args.weight)) return {};
  py::object residual;
  if (gradients) {
    residual = set_residual(t, kind, args);
    if (!residual) return {};
  } else if (!set_unwritten(t, kind, args)) {
    return {};
  }
  const py::object loss = new_scalar(t.like, like.device.cuda, arithmetic(args));
  View view;
  if (!loss || !fresh_view(loss.ptr(), view)) return {};
  args.total = view.data;
  // What is stored is the gradient already, so that a backward whose own gradient is 1 has nothing to do. In float16
  // it would underflow: 1 / numel is there before a GradScaler's factor is.
  double left = args.total_scale;
  if (gradients && args.map.out[0].dtype != DType::f16) {
    const double of_rho = args.rho == Rho::square ? 2.0 : 1.0;
    args.scale = of_rho * args.total_scale;
    args.by_m = wants_of_m_alone(t);
    left = 1.0 / of_rho;
  } else if (gradients && args.weight.data != nullptr) {
    return {};
  }
  if (!without_lock(like, [&] { return torch_side().launcher->reduce(args, like.device.cuda, like.device.index); })) {
    return {};
  }
  if (!gradients) return loss;
  if (args.by_m) without_coefficient_of_m(t);
  const py::float_ more(left);
  const py::object tied =
      differentiable(answers().loss_function, t, {}, kind, more.ptr(), py::make_tuple(residual, loss), true);
  return py::reinterpret_borrow<py::object>(PyTuple_GET_ITEM(tied.ptr(), 1));
}

// loss_row(row, x, m, m_uncond, h, noise, mask, kind, scale, weight): fused.reduce_batch of tensors, or None.
inline PyObject* loss_row(PyObject*, PyObject* const* given, Py_ssize_t n) {
  return answer([&]() -> py::object {
    Terms t;
    bool gradients = false;
    double scale = 0.0;
    if (n != 10 || !number_of(given[8], scale) || !set_reduction(given, t, gradients)) return {};
    return summed_loss(t, gradients, PyLong_AsLong(given[7]), scale, given[9]);
  });
}

// A sample's weight as ops.path_loss takes it: a number goes into the scale; a tensor stays, and has to hold numbers.
inline bool read_weight(PyObject*& weight, const View& like, double& scale) {
  if (weight == Py_None) return true;
  if (checked_number(weight, -kInfinity, scale)) {
    weight = Py_None;
    return true;
  }
  View view;
  return plain_view(weight, view) && checked_value(view, like, -kInfinity);
}

// path_loss(model_output, x, x_coef, noise_coef, noise, m_coef, h, h_coefs, weight, kind, reduction): ops.path_loss of
// tensors without a mask, with kind "l2" or "l1" and reduction "mean" or "sum", its row made and its coefficients
// checked here; or None.
inline PyObject* path_loss(PyObject*, PyObject* const* given, Py_ssize_t n) {
  return answer([&]() -> py::object {
    if (n != 11) return {};
    PyObject *const m = given[0], *const noise = given[4], *const h = given[6];
    PyObject* weight = given[8];
    const bool l1 = is_word(given[9], "l1"), mean = is_word(given[10], "mean");
    if (m == Py_None || !(l1 || is_word(given[9], "l2")) || !(mean || is_word(given[10], "sum"))) return {};
    if (!undisturbed()) return {};
    CheckedRow row;
    Terms t;
    if (!row.set(kFirstOut + kOutX, given[2], -1.0, -kInfinity) || !row.set_h(given[7], h, -1.0, -kInfinity) ||
        !row.set(kFirstOut + kOutZ, given[3], -1.0, -kInfinity) ||
        !row.set(kFirstOut + kOutM, given[5], 1.0, -kInfinity) || !row.into(t, given[1], m, Py_None, h, noise)) {
      return {};
    }
    double scale = 1.0;
    if (!read_weight(weight, t.like_view, scale)) return {};
    int64_t count = mean ? t.like_view.sizes[0] : 1;
    for (int32_t d = 1; d < t.like_view.ndim; ++d) count *= t.like_view.sizes[d];
    scale /= static_cast<double>(std::max<int64_t>(count, 1));
    const bool gradients = grad_enabled() && t.wants_gradient();
    return summed_loss(t, gradients, l1 ? 1 : 0, scale, weight);
  });
}

}  // namespace genkern
