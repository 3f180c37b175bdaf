// A row of genkern/rows.py read into a call: what rows.pack does, in the same order of operations, for rows whose
// coefficients are numbers and plain tensors. False: anything else, which rows.pack takes or words the error of.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "../kernels/rows.h"
#include "plain.h"

namespace genkern {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kRounding = 1e-6;  // rows.ROUNDING

struct PackedRow {
  std::vector<double> cells;
  std::array<PyObject*, kMaxValues> values{};  // borrowed from the row
  std::vector<int64_t> where;
  std::vector<double> scales;
  int n_out = 0, n_h = 0;
  int64_t formula = 0;
  bool use_pred = false, draws = false;

  bool by_tensor(int64_t cell) const {
    for (const int64_t c : where)
      if (c == cell) return true;
    return false;
  }

  bool uses(int64_t cell) const { return cells[static_cast<size_t>(cell)] != 0.0 || by_tensor(cell); }

  static int first(int out) { return kFirstOut + kOutCells * out; }

  // Whether the term x (0) or m (1) has a coefficient, in an output or in the prediction.
  bool uses_term(int term) const {
    if (formula != 0 || (use_pred && uses(kA + term))) return true;
    for (int j = 0; j < n_out; ++j)
      if (uses(first(j) + kOutX + term)) return true;
    return false;
  }
};

inline bool is_word(PyObject* object, const char* word) {
  return PyUnicode_Check(object) && PyUnicode_CompareWithASCIIString(object, word) == 0;
}

inline bool number_of(PyObject* value, double& number) {
  if (PyFloat_CheckExact(value)) {
    number = PyFloat_AS_DOUBLE(value);
    return true;
  }
  if (!PyLong_CheckExact(value)) return false;
  number = PyLong_AsDouble(value);
  return !(number == -1.0 && PyErr_Occurred() != nullptr);
}

// The coefficient of a cell: scale times a number, or a plain tensor [B] or [1], either times the numbers of Scaled
// around it.
inline bool read_cell(PyObject* value, int64_t cell, PackedRow& row, double scale = 1.0) {
  double number = 0.0;
  while (reinterpret_cast<PyObject*>(Py_TYPE(value)) == torch_side().scaled) {
    if (!number_of(PyTuple_GET_ITEM(value, 1), number)) return false;
    scale *= number;
    value = PyTuple_GET_ITEM(value, 0);
  }
  auto& at = row.cells[static_cast<size_t>(cell)];
  if (number_of(value, number)) {
    at = scale * number;
    return true;
  }
  if (!is_plain(value) || row.where.size() == kMaxValues) return false;
  at = 0.0;
  row.values[row.where.size()] = value;
  row.where.push_back(cell);
  row.scales.push_back(scale);
  return true;
}

inline bool read_clip(PyObject* clip, PackedRow& row) {
  row.cells[kLo] = -kInfinity, row.cells[kHi] = kInfinity;
  if (clip == Py_None) return true;
  return PyTuple_CheckExact(clip) && PyTuple_GET_SIZE(clip) == 2 &&
         number_of(PyTuple_GET_ITEM(clip, 0), row.cells[kLo]) && number_of(PyTuple_GET_ITEM(clip, 1), row.cells[kHi]);
}

inline bool read_guidance(PyObject* guidance, PackedRow& row) {
  row.cells[kW] = 1.0;
  return guidance == Py_None || read_cell(guidance, kW, row);
}

// rows._fold: an unclamped prediction into x and m.
inline bool fold(PackedRow& row) {
  if (row.by_tensor(kA) || row.by_tensor(kB)) return false;
  for (int j = 0; j < row.n_out; ++j) {
    const int first = PackedRow::first(j);
    for (const int term : {kOutY, kOutX, kOutM})
      if (row.by_tensor(first + term)) return false;
    bool alone = row.cells[first + kOutY] != 0.0;
    for (int term = kOutX; term < kOutCells; ++term) alone = alone && row.cells[first + term] == 0.0;
    if (alone) return false;
  }
  for (int j = 0; j < row.n_out; ++j) {
    double* out = row.cells.data() + PackedRow::first(j);
    const double y = out[kOutY];
    if (y == 0.0) continue;
    out[kOutX] += y * row.cells[kA];
    out[kOutM] += y * row.cells[kB];
    out[kOutY] = 0.0;
  }
  row.cells[kA] = row.cells[kB] = 0.0;
  return true;
}

// rows._pack_row
inline bool read_linear_row(PyObject* object, PackedRow& row) {
  static PyObject *const outs_name = interned("outs"), *const pred_name = interned("pred"),
                         *const clip_name = interned("clip"), *const guidance_name = interned("guidance"),
                         *const h_name = interned("h"), *const elementwise_name = interned("elementwise");
  static const std::array<PyObject*, 7> terms{interned("y"), interned("x"), interned("m"), nullptr,
                                              nullptr,       nullptr,       interned("z")};
  const py::object outs = attribute(object, outs_name), pred = attribute(object, pred_name),
                   clip = attribute(object, clip_name), guidance = attribute(object, guidance_name),
                   elementwise = attribute(object, elementwise_name);
  if (!outs || !pred || !clip || !guidance || !PyTuple_CheckExact(outs.ptr())) return false;
  if (elementwise.ptr() != Py_None) return false;  // goes the way through Python
  row.n_out = static_cast<int>(PyTuple_GET_SIZE(outs.ptr()));
  if (row.n_out < 1 || row.n_out > kMaxOuts) return false;
  row.cells.assign(static_cast<size_t>(PackedRow::first(row.n_out)), 0.0);
  const bool predicts = pred.ptr() != Py_None;
  if (predicts) {
    if (!PyTuple_CheckExact(pred.ptr()) || PyTuple_GET_SIZE(pred.ptr()) != 2) return false;
    for (const int cell : {kA, kB})
      if (!read_cell(PyTuple_GET_ITEM(pred.ptr(), cell), cell, row)) return false;
  } else if (clip.ptr() != Py_None) {
    return false;
  }
  if (!read_clip(clip.ptr(), row) || !read_guidance(guidance.ptr(), row)) return false;
  for (int j = 0; j < row.n_out; ++j) {
    PyObject* const out = PyTuple_GET_ITEM(outs.ptr(), j);
    if (reinterpret_cast<PyObject*>(Py_TYPE(out)) != torch_side().out) return false;
    const int first = PackedRow::first(j);
    const py::object h = attribute(out, h_name);
    if (!h || !PyTuple_CheckExact(h.ptr()) || PyTuple_GET_SIZE(h.ptr()) > kMaxH) return false;
    const int n_h = static_cast<int>(PyTuple_GET_SIZE(h.ptr()));
    row.n_h = std::max(row.n_h, n_h);
    for (int term = 0; term < kOutCells; ++term) {
      if (term >= kOutH0 && term <= kOutH2) {
        if (term - kOutH0 < n_h && !read_cell(PyTuple_GET_ITEM(h.ptr(), term - kOutH0), first + term, row))
          return false;
        continue;
      }
      // Held by the row: the dataclass's slot keeps its reference.
      const py::object value = attribute(out, terms[static_cast<size_t>(term)]);
      if (!value || !read_cell(value.ptr(), first + term, row)) return false;
    }
    if (row.uses(first + kOutY)) {
      if (!predicts) return false;
      row.use_pred = true;
    }
    row.draws = row.draws || row.uses(first + kOutZ);
  }
  if (row.use_pred && clip.ptr() == Py_None && fold(row)) row.use_pred = false;
  return true;
}

// rows.ddim_numbers: whether it raises nothing.
inline bool ddim_holds(Formula formula, const double* path) {
  const double alpha_t = path[0], sigma_t = path[1], alpha_s = path[2], sigma_s = path[3], eta = path[4];
  for (int p = 0; p < kPathCells; ++p)
    if (!std::isfinite(path[p])) return false;
  double d = 0.0;
  if (eta != 0.0) {
    if (sigma_t == 0.0 || alpha_s == 0.0) return false;
    const double ratio = alpha_t / alpha_s, kept = 1.0 - ratio * ratio;
    if (kept < -kRounding) return false;
    d = eta * (sigma_s / sigma_t) * std::sqrt(std::max(kept, 0.0));
  }
  if (sigma_s * sigma_s - d * d < -kRounding * sigma_s * sigma_s) return false;
  return formula == Formula::ddim_epsilon ? alpha_t != 0.0 : formula == Formula::ddim_v || sigma_t != 0.0;
}

// rows._pack_ddim, in two parts, between which clip, guidance and path values are set.
inline bool begin_ddim(PyObject* prediction, PyObject* return_pred, bool clips, PackedRow& row) {
  const Formula formula = is_word(prediction, "epsilon")  ? Formula::ddim_epsilon
                          : is_word(prediction, "v")      ? Formula::ddim_v
                          : is_word(prediction, "sample") ? Formula::ddim_sample
                                                          : Formula::none;
  if (formula == Formula::none || !PyBool_Check(return_pred)) return false;
  const bool pred = return_pred == Py_True;
  row.formula = static_cast<int64_t>(formula);
  row.n_out = pred ? 2 : 1;
  row.use_pred = pred || clips;
  row.cells.assign(kAllCells, 0.0);
  if (pred) row.cells[static_cast<size_t>(PackedRow::first(1) + kOutY)] = 1.0;
  return true;
}

// Of path values that are numbers the row is computed here.
inline bool end_ddim(PackedRow& row) {
  const auto formula = static_cast<Formula>(row.formula);
  for (int p = 0; p < kPathCells; ++p) {
    if (!row.by_tensor(kMaxCells + p)) continue;
    row.draws = row.uses(kMaxCells + kPathCells - 1);
    return true;
  }
  if (!ddim_holds(formula, row.cells.data() + kMaxCells)) return false;
  row.formula = 0;
  ddim_cells(formula, row.cells.data() + kMaxCells, row.use_pred, row.cells.data());
  row.cells.resize(static_cast<size_t>(PackedRow::first(row.n_out)));
  row.draws = row.cells[kFirstOut + kOutZ] != 0.0;
  return true;
}

inline bool read_ddim_row(PyObject* object, PackedRow& row) {
  static const std::array<PyObject*, 5> path{interned("alpha_t"), interned("sigma_t"), interned("alpha_s"),
                                             interned("sigma_s"), interned("eta")};
  static PyObject *const clip_name = interned("clip"), *const guidance_name = interned("guidance"),
                         *const pred_name = interned("return_pred"), *const prediction_name = interned("prediction");
  const py::object clip = attribute(object, clip_name), guidance = attribute(object, guidance_name),
                   pred = attribute(object, pred_name), prediction = attribute(object, prediction_name);
  if (!clip || !guidance || !pred || !prediction) return false;
  if (!begin_ddim(prediction.ptr(), pred.ptr(), clip.ptr() != Py_None, row)) return false;
  if (!read_clip(clip.ptr(), row) || !read_guidance(guidance.ptr(), row)) return false;
  for (int p = 0; p < kPathCells; ++p) {
    const py::object value = attribute(object, path[static_cast<size_t>(p)]);
    if (!value || !read_cell(value.ptr(), kMaxCells + p, row)) return false;
  }
  return end_ddim(row);
}

inline bool read_row(PyObject* object, PackedRow& row) {
  const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  if (type == torch_side().row) return read_linear_row(object, row);
  return type == torch_side().ddim_row && read_ddim_row(object, row);
}

}  // namespace genkern
