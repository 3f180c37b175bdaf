// Coefficients as the callers of genkern/ops.py give them, checked as check.coefficient does. False: check.coefficient
// takes them in another form, or words the error.
#pragma once

#include <cmath>
#include <limits>

#include "terms.h"

namespace genkern {

// A number in [low, the largest float32]: float64 arithmetic takes larger ones, which go the way through Python.
inline bool checked_number(PyObject* value, double low, double& number) {
  constexpr double kLargest = std::numeric_limits<float>::max();
  return number_of(value, number) && low <= number && -kLargest <= number && number <= kLargest;  // false where NaN
}

// factor times a coefficient, as the number or the tensor of a cell; of a Scaled one, as losses of methods give it, the
// tensor is checked, by checked_values.
inline bool read_coefficient(PyObject* value, double factor, double low, int64_t cell, PackedRow& row) {
  double number = 0.0;
  if (checked_number(value, low, number)) {
    row.cells[static_cast<size_t>(cell)] = factor * number;
    return true;
  }
  const bool scaled = reinterpret_cast<PyObject*>(Py_TYPE(value)) == torch_side().scaled;
  return is_plain(scaled ? PyTuple_GET_ITEM(value, 0) : value) && read_cell(value, cell, row, factor);
}

template <typename T>
bool all_within(const View& view, double low) {
  const auto* data = static_cast<const T*>(view.data);
  for (int64_t k = 0; k < view.numel(); ++k)
    if (!std::isfinite(data[k]) || static_cast<double>(data[k]) < low) return false;
  return true;
}

// Whether a tensor is of one element or one a sample, its numbers finite and >= low where they are looked at: on the
// CPU, elsewhere under gk.debug(values=True), which only the way through Python does.
inline bool checked_value(const View& value, const View& like, double low) {
  if (value.ndim != 1 || (value.sizes[0] != 1 && value.sizes[0] != like.sizes[0])) return false;
  if (!(value.device == like.device) || !value.contiguous()) return false;
  if (value.element != Element::f32 && value.element != Element::f64) return false;
  if (value.device.cuda) return !looks_at_device_values();
  return value.element == Element::f32 ? all_within<float>(value, low) : all_within<double>(value, low);
}

inline bool checked_values(const Terms& t, double low) {
  for (const View& value : t.call.values)
    if (!checked_value(value, t.like_view, low)) return false;
  return true;
}

// A row of one output, r = c_x x + c_m m + sum_k c_hk h_k + c_z z, its coefficients >= low given by set.
struct LinearRow {
  PackedRow packed;
  double low;

  explicit LinearRow(double least = -kInfinity) : low(least) {
    packed.n_out = 1;
    packed.cells.assign(static_cast<size_t>(PackedRow::first(1)), 0.0);
    packed.cells[kLo] = -kInfinity, packed.cells[kHi] = kInfinity, packed.cells[kW] = 1.0;
  }

  bool set(int term, PyObject* coefficient, double factor) {
    return read_coefficient(coefficient, factor, low, kFirstOut + term, packed);
  }

  bool set_guidance(PyObject* scale) { return read_coefficient(scale, 1.0, -kInfinity, kW, packed); }

  // Those of h: none given stand for 1 each.
  bool set_h(PyObject* coefficients, size_t n_h, double factor) {
    if (!PyTuple_CheckExact(coefficients)) return false;
    const auto n = static_cast<size_t>(PyTuple_GET_SIZE(coefficients));
    if (n != 0 && n != n_h) return false;
    packed.n_h = static_cast<int>(n_h);
    for (size_t k = 0; k < n_h; ++k) {
      const int term = kOutH0 + static_cast<int>(k);
      if (n == 0) {
        packed.cells[static_cast<size_t>(kFirstOut + term)] = factor;
      } else if (!set(term, PyTuple_GET_ITEM(coefficients, static_cast<Py_ssize_t>(k)), factor)) {
        return false;
      }
    }
    return true;
  }

  // The row into a call whose terms are set, its tensors checked.
  bool into(Terms& t, PyObject* noise) {
    packed.draws = packed.uses(kFirstOut + kOutZ);
    return t.like_view.ndim > 0 && set_packed(std::move(packed), noise, 1, t) && checked_values(t, low);
  }
};

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

// The row of a DDIM step between path values that are numbers: of tensors check.ddim_path looks at more than at each.
inline bool read_checked_ddim(PyObject* prediction, PyObject* const* path, PyObject* clip, PyObject* guidance,
                              PyObject* return_pred, PackedRow& row) {
  if (!begin_ddim(prediction, return_pred, clip != Py_None, row)) return false;
  for (int p = 0; p < kPathCells; ++p)
    if (!checked_number(path[p], 0.0, row.cells[static_cast<size_t>(kMaxCells + p)])) return false;
  row.cells[kW] = 1.0;
  if (guidance != Py_None && !read_coefficient(guidance, 1.0, -kInfinity, kW, row)) return false;
  return checked_clip(clip, row) && end_ddim(row);
}

}  // namespace genkern
