// The tensors and the row of an eager call, gathered from Python objects into a Call, and checked.
//
// Every function returns false, at most with a Python error set that the caller clears, where something is not plain:
// then nothing has been written, and the way through Python takes the call or words its error.
#pragma once

#include <string>
#include <utility>

#include "../faces/numbers.h"
#include "row.h"

namespace genkern {

constexpr Py_ssize_t kFirstValue = 14;  // of a call's tensors, in the order of genkern/spec.py

struct Terms {
  PyObject *x = nullptr, *m = nullptr, *z = nullptr, *m_uncond = nullptr, *mask = nullptr, *sample_ids = nullptr;
  PyObject *v = nullptr, *known = nullptr;  // of calls laid out before
  std::array<PyObject*, kMaxH> h{};
  std::vector<PyObject*> values;
  py::object held_ids;  // read from a Noise
  py::object held_h;    // of a list
  Call call;
  PyObject* like = nullptr;  // what the outputs take their shape, strides and device from
  View like_view;
  size_t n_out = 0;
  bool z_unread = false;  // given where the row has no coefficient for it

  bool wants_gradient() const {
    for (PyObject* t : {x, m, z, m_uncond, h[0], h[1], h[2], v, known})
      if (t != nullptr && requires_grad(t)) return true;
    return values_want_gradient();
  }

  bool values_want_gradient() const {
    for (PyObject* t : values)
      if (requires_grad(t)) return true;
    return false;
  }
};

inline bool add_view(PyObject* object, PyObject*& kept, MaybeView& view) {
  if (object == Py_None) return true;
  View found;
  if (!plain_view(object, found)) return false;
  kept = object;
  view = found;
  return true;
}

inline bool set_like(Terms& t) {
  t.like = t.x != nullptr ? t.x : t.m != nullptr ? t.m : t.z;
  if (t.like == nullptr) return false;
  t.like_view = like_of(t.call);
  return true;
}

inline bool read_unsigned(PyObject* object, PyObject* name, int64_t& number) {
  const py::object found = attribute(object, name);
  if (!found || !PyLong_CheckExact(found.ptr())) return false;
  number = static_cast<int64_t>(PyLong_AsUnsignedLongLong(found.ptr()));
  return PyErr_Occurred() == nullptr;
}

// A Noise whose numbers are on the host, its sample ids given as a tensor where they are.
inline bool set_noise_value(PyObject* noise, int64_t kind, Terms& t) {
  static PyObject *const seed = interned("seed"), *const stream = interned("stream"), *const draw = interned("draw"),
                         *const ids = interned("sample_ids");
  t.call.noise = kind;
  t.call.key.resize(3);
  if (!read_unsigned(noise, seed, t.call.key[0]) || !read_unsigned(noise, stream, t.call.key[1]) ||
      !read_unsigned(noise, draw, t.call.key[2])) {
    return false;
  }
  t.held_ids = attribute(noise, ids);
  if (!t.held_ids || !add_view(t.held_ids.ptr(), t.sample_ids, t.call.sample_ids)) return false;
  return !t.call.sample_ids || t.call.sample_ids->ndim == 1;
}

inline bool is_noise(PyObject* object) { return reinterpret_cast<PyObject*>(Py_TYPE(object)) == torch_side().noise; }

// A tuple as it is; of a list a tuple, which no one else can take an element from, and `held` keeps. Null of others.
inline PyObject* as_tuple(PyObject* sequence, py::object& held) {
  if (PyTuple_CheckExact(sequence)) return sequence;
  if (!PyList_CheckExact(sequence)) return nullptr;
  held = py::reinterpret_steal<py::object>(PyList_AsTuple(sequence));
  return held.ptr();
}

// The tensors beside the row, as fused._checked and check.terms have them.
inline bool set_terms(PyObject* x, PyObject* m, PyObject* m_uncond, PyObject* h, PyObject* noise, Terms& t) {
  if (!add_view(x, t.x, t.call.x) || !add_view(m, t.m, t.call.m) || !add_view(m_uncond, t.m_uncond, t.call.m_uncond))
    return false;
  if (!is_noise(noise) && !add_view(noise, t.z, t.call.z)) return false;
  h = as_tuple(h, t.held_h);
  if (h == nullptr || PyTuple_GET_SIZE(h) > kMaxH || !set_like(t)) return false;
  t.call.h.reserve(static_cast<size_t>(PyTuple_GET_SIZE(h)));
  for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(h); ++k) {
    View view;
    if (!plain_view(PyTuple_GET_ITEM(h, k), view)) return false;
    t.h[static_cast<size_t>(k)] = PyTuple_GET_ITEM(h, k);
    t.call.h.push_back(view);
  }
  const int64_t widest = element_size(t.like_view.element);
  for (const MaybeView* v : {&t.call.m, &t.call.m_uncond, &t.call.z})
    if (*v && element_size((*v)->element) > widest) return false;
  for (const View& v : t.call.h)
    if (element_size(v.element) > widest) return false;
  return true;
}

// A row, and what it asks of the terms: as fused._checked and fused._call have it.
inline bool set_packed(PackedRow&& row, PyObject* noise, int64_t draw_kind, Terms& t) {
  if (row.n_h > static_cast<int>(t.call.h.size())) return false;
  if (t.m_uncond == nullptr ? row.cells[kW] != 1.0 || row.by_tensor(kW) : t.m == nullptr) return false;
  if ((t.m == nullptr && row.uses_term(1)) || (t.x == nullptr && row.uses_term(0))) return false;
  if (!row.draws) {
    t.z_unread = t.z != nullptr;
    if (t.z_unread && t.like == t.z) return false;
    if (t.z_unread) array_of(*t.call.z, t.like_view, "z");  // throws where it is not of the state's kind
    t.z = nullptr;
    t.call.z.reset();
  } else if (t.z == nullptr) {
    if (!is_noise(noise) || !set_noise_value(noise, draw_kind, t)) return false;
  }
  t.n_out = static_cast<size_t>(row.n_out);
  t.call.formula = row.formula;
  t.call.use_pred = row.use_pred;
  for (size_t k = 0; k < row.where.size(); ++k) {
    View view;
    if (!plain_view(row.values[k], view) || view.ndim == 0) return false;
    t.values.push_back(row.values[k]);
    t.call.values.push_back(view);
  }
  t.call.row = std::move(row.cells);
  t.call.cells = std::move(row.where);
  t.call.scales = std::move(row.scales);
  return true;
}

inline bool set_row(PyObject* object, PyObject* noise, int64_t draw_kind, Terms& t) {
  PackedRow row;
  return read_row(object, row) && set_packed(std::move(row), noise, draw_kind, t);
}

// A call laid out before: its numbers, and its tensors in the order of genkern/spec.py.
inline bool set_laid_out(PyObject* numbers, PyObject* tensors, Terms& t, int64_t& kind) {
  if (PyUnicode_Check(numbers)) {
    if (!PyUnicode_IS_COMPACT_ASCII(numbers)) return false;
    const auto* text = reinterpret_cast<const char*>(PyUnicode_1BYTE_DATA(numbers));
    const std::string bytes = bytes_of(text, static_cast<size_t>(PyUnicode_GET_LENGTH(numbers)));
    kind = read_numbers(bytes.data(), bytes.size(), t.call);
  } else if (PyBytes_CheckExact(numbers)) {
    kind = read_numbers(PyBytes_AS_STRING(numbers), static_cast<size_t>(PyBytes_GET_SIZE(numbers)), t.call);
  } else {
    return false;
  }
  if (!PyTuple_CheckExact(tensors) && !PyList_CheckExact(tensors)) return false;
  if (PySequence_Fast_GET_SIZE(tensors) < kFirstValue) return false;
  PyObject** given = PySequence_Fast_ITEMS(tensors);
  if (!add_view(given[0], t.x, t.call.x) || !add_view(given[1], t.m, t.call.m) || !add_view(given[2], t.z, t.call.z) ||
      !add_view(given[3], t.m_uncond, t.call.m_uncond) || !add_view(given[10], t.sample_ids, t.call.sample_ids) ||
      !add_view(given[11], t.v, t.call.v) || !add_view(given[12], t.known, t.call.known) ||
      !add_view(given[13], t.mask, t.call.mask)) {
    return false;
  }
  for (size_t k = 0; k < kMaxH; ++k) {
    MaybeView view;
    if (!add_view(given[4 + k], t.h[k], view)) return false;
    if (view) t.call.h.push_back(*view);
  }
  PyObject* unread = nullptr;
  if (!add_view(given[7], unread, t.call.table) || !add_view(given[8], unread, t.call.index) ||
      !add_view(given[9], unread, t.call.device_key)) {
    return false;
  }
  if (given[7] != Py_None) t.values.push_back(given[7]);  // a table may want a gradient too
  for (Py_ssize_t k = kFirstValue; k < PySequence_Fast_GET_SIZE(tensors); ++k) {
    View view;
    if (!plain_view(given[k], view)) return false;
    t.values.push_back(given[k]);
    t.call.values.push_back(view);
  }
  return true;
}

// Whether an output is an input itself, or certainly apart from it; dense ones are judged by make_args.
inline bool certainly_apart(const View& out, const View& in, bool may_be_same) {
  if (out.contiguous() && in.contiguous()) return true;
  if (may_be_same && in.data == out.data && in.element == out.element) {
    bool same = in.ndim == out.ndim;
    for (int32_t d = 0; same && d < out.ndim; ++d) same = in.strides[d] == out.strides[d];
    if (same) return true;
  }
  if (out.numel() == 0 || in.numel() == 0) return true;
  const Extent a = extent(out, element_size(out.element)), b = extent(in, element_size(in.element));
  return a.end <= b.begin || b.end <= a.begin;
}

inline bool outputs_certainly_apart(const Call& call) {
  for (size_t j = 0; j < call.out.size(); ++j) {
    const View& out = call.out[j];
    for (const MaybeView* in : {&call.x, &call.m, &call.m_uncond, &call.z, &call.v, &call.known, &call.mask})
      if (*in && !certainly_apart(out, **in, true)) return false;
    for (const View& in : call.h)
      if (!certainly_apart(out, in, true)) return false;
    if (call.table && !certainly_apart(out, *call.table, false)) return false;
    for (const View& in : call.values)
      if (!certainly_apart(out, in, false)) return false;
    for (size_t k = 0; k < j; ++k)
      if (!certainly_apart(out, call.out[k], false)) return false;
  }
  return true;
}

}  // namespace genkern
