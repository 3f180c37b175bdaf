// How an eager call ends: by its result, by None where the call has to go elsewhere, or by a result that is tied to
// autograd.
#pragma once

#include <vector>

#include "terms.h"

namespace genkern {

constexpr int64_t kBrief = 4096;  // elements up to which a CPU call keeps Python's lock: releasing it costs as much

// apply of the autograd Functions of genkern/eager_functions.py, and how many calls were answered
struct Answers {
  PyObject *map_function = nullptr, *reduce_function = nullptr, *loss_function = nullptr;
  int64_t count = 0;
};

inline Answers& answers() {
  static Answers found;
  return found;
}

inline PyObject* elsewhere() {
  if (PyErr_Occurred() != nullptr && !PyErr_ExceptionMatches(PyExc_Exception)) return nullptr;  // an interrupt
  PyErr_Clear();
  Py_RETURN_NONE;
}

// A body that answers nullptr, false or by an exception of a check where the call has to go elsewhere.
template <typename Body>
PyObject* answer(Body body) {
  try {
    py::object found = body();
    if (!found) return elsewhere();
    ++answers().count;
    return found.release().ptr();
  } catch (py::error_already_set& error) {
    error.restore();
    return nullptr;
  } catch (const std::exception&) {
    return elsewhere();
  }
}

template <typename Run>
bool without_lock(const View& like, Run run) {
  if (like.device.cuda || like.numel() <= kBrief) return run();
  py::gil_scoped_release release;
  return run();
}

// What backward reads of a call: nothing, the coefficients, or all of its tensors (map_function.py: kept_of).
enum Keeps { kNothing, kValues, kAll };

inline Keeps keeps(const Terms& t) {
  const bool linear = t.call.formula == 0 && !t.call.use_pred && t.m_uncond == nullptr;
  if (!linear || t.values_want_gradient()) return kAll;
  return t.values.empty() ? kNothing : kValues;
}

// function(ready, [mask,] *tensors): ties the results to a Function that has nothing left to compute. ready = (call,
// what to keep, results), with call = (numbers, how many h, dtype codes of map's outputs, `more`, dtypes of the
// tensors), the tensors in the order of genkern/spec.py.
inline py::object differentiable(PyObject* function, const Terms& t, const std::vector<int>& codes, int64_t kind,
                                 PyObject* more, const py::object& results, bool masked) {
  std::array<PyObject*, 2 + kFirstValue + kMaxValues> arguments;
  arguments.fill(Py_None);
  size_t n = masked ? 2 : 1;
  if (masked && t.mask != nullptr) arguments[1] = t.mask;
  const size_t n_tensors = kFirstValue + t.values.size();
  py::tuple dtypes(n_tensors);
  const auto put = [&](size_t slot, PyObject* tensor, const View& view) {
    arguments[n + slot] = tensor;
    const int code = dtype_code(view.element);
    if (code >= 0) PyTuple_SET_ITEM(dtypes.ptr(), static_cast<Py_ssize_t>(slot), Py_NewRef(torch_side().dtypes[code]));
  };
  if (t.x != nullptr) put(0, t.x, *t.call.x);
  if (t.m != nullptr) put(1, t.m, *t.call.m);
  if (t.z != nullptr) put(2, t.z, *t.call.z);
  if (t.m_uncond != nullptr) put(3, t.m_uncond, *t.call.m_uncond);
  for (size_t k = 0; k < t.call.h.size(); ++k) put(4 + k, t.h[k], t.call.h[k]);
  if (t.sample_ids != nullptr) arguments[n + 10] = t.sample_ids;
  for (size_t k = 0; k < t.values.size(); ++k) put(kFirstValue + k, t.values[k], t.call.values[k]);
  for (Py_ssize_t slot = 0; slot < PyTuple_GET_SIZE(dtypes.ptr()); ++slot)
    if (PyTuple_GET_ITEM(dtypes.ptr(), slot) == nullptr) PyTuple_SET_ITEM(dtypes.ptr(), slot, Py_NewRef(Py_None));

  py::tuple code_tuple(codes.size());
  for (size_t j = 0; j < codes.size(); ++j) code_tuple[j] = py::int_(codes[j]);
  const py::bytes numbers(write_numbers(t.call, kind));
  const py::int_ n_h(t.call.h.size()), kept(static_cast<int>(keeps(t)));
  const auto packed = py::reinterpret_steal<py::object>(
      PyTuple_Pack(5, numbers.ptr(), n_h.ptr(), code_tuple.ptr(), more, dtypes.ptr()));
  const auto ready = py::reinterpret_steal<py::object>(PyTuple_Pack(3, packed.ptr(), kept.ptr(), results.ptr()));
  arguments[0] = ready.ptr();
  // What it raises is the caller's affair: a hook on saved tensors may, to end a recomputation.
  auto tied =
      py::reinterpret_steal<py::object>(PyObject_Vectorcall(function, arguments.data(), n + n_tensors, nullptr));
  if (!tied) throw py::error_already_set();
  return tied;
}

}  // namespace genkern
