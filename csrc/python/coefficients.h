// Coefficients as the callers of genkern/ops.py give them, checked as check.coefficient does, and the rows of them.
// False: check.coefficient takes them in another form, or words the error.
#pragma once

#include <cmath>
#include <limits>

#include "terms.h"

namespace genkern {

// The least number that compares > 0 also where denormal numbers are flushed to 0 (torch.set_flush_denormal); a smaller
// one goes the way through Python.
constexpr double kAboveZero = std::numeric_limits<double>::min();

// A number in [low, the largest float32]: float64 arithmetic takes larger ones, which go the way through Python.
inline bool checked_number(PyObject* value, double low, double& number) {
  constexpr double kLargest = std::numeric_limits<float>::max();
  return number_of(value, number) && low <= number && -kLargest <= number && number <= kLargest;  // false where NaN
}

template <typename T>
bool all_within(const View& view, double low) {
  const auto* data = static_cast<const T*>(view.data);
  for (int64_t k = 0; k < view.sizes[0]; ++k)
    if (!std::isfinite(data[k]) || static_cast<double>(data[k]) < low) return false;
  return true;
}

inline bool is_wide(const View& view) { return view.element == Element::f32 || view.element == Element::f64; }

// Whether a tensor is of one element or one a sample, its numbers finite and >= low where they are looked at: on the
// CPU, elsewhere under gk.debug(values=True), which only the way through Python does.
inline bool checked_value(const View& value, const View& like, double low) {
  if (value.ndim != 1 || (value.sizes[0] != 1 && value.sizes[0] != like.sizes[0])) return false;
  if (!(value.device == like.device) || !value.contiguous() || !is_wide(value)) return false;
  if (value.device.cuda) return !looks_at_device_values();
  return value.element == Element::f32 ? all_within<float>(value, low) : all_within<double>(value, low);
}

// clip as check.clip_range has it: None, (lo, hi), or one number c for (-c, c).
inline bool checked_clip(PyObject* clip, PackedRow& row) {
  double &lo = row.cells[kLo], &hi = row.cells[kHi];
  if (number_of(clip, hi)) {
    lo = -hi;
  } else if (!read_clip(clip, row)) {
    return false;
  }
  return clip == Py_None || (std::isfinite(lo) && std::isfinite(hi) && lo < hi);
}

// A row made of coefficients that are set one by one, each with the least that it may be: of one output, linear in the
// terms, unless set_ddim makes it that of (13.13).
class CheckedRow {
 public:
  CheckedRow() {
    packed_.n_out = 1;
    packed_.cells.assign(static_cast<size_t>(PackedRow::first(1)), 0.0);
    packed_.cells[kLo] = -kInfinity, packed_.cells[kHi] = kInfinity, packed_.cells[kW] = 1.0;
  }

  // factor times a coefficient into a cell; of a Scaled one, as losses of methods give it, the tensor is checked, where
  // no range is asked of the product.
  bool set(int64_t cell, PyObject* value, double factor, double low) {
    if (reinterpret_cast<PyObject*>(Py_TYPE(value)) != torch_side().scaled) return set_alone(cell, value, factor, low);
    double scale = 0.0;
    return low == -kInfinity && number_of(PyTuple_GET_ITEM(value, 1), scale) &&
           set_alone(cell, PyTuple_GET_ITEM(value, 0), factor * scale, low);
  }

  // The same of a coefficient that must not be a Scaled one.
  bool set_alone(int64_t cell, PyObject* value, double factor, double low) {
    double number = 0.0;
    if (checked_number(value, low, number)) {
      packed_.cells[static_cast<size_t>(cell)] = factor * number;
      return true;
    }
    View view;
    if (!fresh_view(value, view) || !is_wide(view)) return false;
    if (view.ndim != 1 && view.numel() == 1) {
      static PyObject *const reshape = interned("reshape"), *const one = PyLong_FromLong(1);
      held_.push_back(py::reinterpret_steal<py::object>(PyObject_CallMethodOneArg(value, reshape, one)));
      value = held_.back().ptr();
      if (value == nullptr) return false;
    }
    const size_t k = packed_.where.size();
    if (!read_cell(value, cell, packed_, factor)) return false;
    lows_[k] = low;
    return true;
  }

  // The coefficients of h, both tuples or lists: none given stand for 1 each.
  bool set_h(PyObject* coefficients, PyObject* h, double factor, double low) {
    if (!PyTuple_CheckExact(h) && !PyList_CheckExact(h)) return false;
    coefficients = as_tuple(coefficients, held_coefficients_);
    if (coefficients == nullptr) return false;
    const Py_ssize_t n = PyTuple_GET_SIZE(coefficients), n_h = PySequence_Fast_GET_SIZE(h);
    if ((n != 0 && n != n_h) || n_h > kMaxH) return false;
    packed_.n_h = static_cast<int>(n_h);
    for (Py_ssize_t k = 0; k < n_h; ++k) {
      const int64_t cell = kFirstOut + kOutH0 + k;
      if (n == 0) {
        packed_.cells[static_cast<size_t>(cell)] = factor;
      } else if (!set(cell, PyTuple_GET_ITEM(coefficients, k), factor, low)) {
        return false;
      }
    }
    return true;
  }

  // A guidance scale, which goes with the unconditional output.
  bool set_guidance(PyObject* scale, PyObject* m_uncond) {
    if ((scale == Py_None) != (m_uncond == Py_None)) return false;
    packed_.cells[kW] = 1.0;
    return scale == Py_None || set_alone(kW, scale, 1.0, -kInfinity);
  }

  // A DDIM step's row but for the guidance. Beside path values that are tensors eta is 0: of another one
  // check.ddim_path looks at more than each by itself.
  bool set_ddim(PyObject* prediction, PyObject* const* path, PyObject* clip, PyObject* return_pred) {
    if (!begin_ddim(prediction, return_pred, clip != Py_None, packed_) || !checked_clip(clip, packed_)) return false;
    const auto formula = static_cast<Formula>(packed_.formula);
    for (int p = 0; p < kPathCells; ++p) {
      const bool divides = (p == 0 && formula == Formula::ddim_epsilon) || (p == 1 && formula == Formula::ddim_sample);
      if (!set_alone(kMaxCells + p, path[p], 1.0, divides ? kAboveZero : 0.0)) return false;
    }
    return end_ddim(packed_) && (packed_.formula == 0 || !packed_.uses(kMaxCells + kPathCells - 1));
  }

  // The tensors beside the row, and the row, into a call, all checked. A noise that is not given is not drawn here.
  bool into(Terms& t, PyObject* x, PyObject* m, PyObject* m_uncond, PyObject* h, PyObject* noise) {
    packed_.draws = packed_.draws || packed_.uses(kFirstOut + kOutZ);
    if ((packed_.draws && noise == Py_None) || !set_terms(x, m, m_uncond, h, noise, t)) return false;
    if (t.like_view.ndim == 0 || !set_packed(std::move(packed_), noise, 1, t)) return false;
    for (size_t k = 0; k < t.call.values.size(); ++k)
      if (!checked_value(t.call.values[k], t.like_view, lows_[k])) return false;
    return true;
  }

 private:
  PackedRow packed_;
  std::array<double, kMaxValues> lows_{};
  std::vector<py::object> held_;  // tensors of one element as [1]
  py::object held_coefficients_;  // of a list
};

}  // namespace genkern
