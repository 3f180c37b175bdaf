// genkern._arrays, the eager half: calls on plain torch tensors past torch's dispatcher, whose boxed interface costs
// more than the rest of a small call. The same checks (faces/call.h) and the same kernels, through torch's threads,
// streams and allocator; None wherever anything is not plain, and genkern/fused.py then goes its way through Python.
#include "eager.h"

#include <algorithm>

#include "terms.h"

namespace genkern {
namespace {

constexpr int64_t kBrief = 4096;  // elements up to which a CPU call keeps Python's lock: releasing it costs as much

// apply of the autograd Functions of genkern/functions.py
PyObject *map_function = nullptr, *reduce_function = nullptr, *loss_function = nullptr;
int64_t calls = 0;

PyObject* elsewhere() {
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
    ++calls;
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

bool launch_map(const MapArgs& args, const View& like) {
  return without_lock(like, [&] { return torch_side().launcher->map(args, like.device.cuda, like.device.index); });
}

// New outputs, one of each dtype code.
py::object map_to_new(Terms& t, const std::vector<int>& codes) {
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
py::object set_outputs(PyObject* out, const std::vector<int>& codes, Call& call) {
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

bool count_version(const py::object& outs) {
  return static_cast<bool>(
      py::reinterpret_steal<py::object>(PyObject_CallOneArg(torch_side().increment_version, outs.ptr())));
}

bool read_codes(PyObject* dtypes, size_t n_out, int like_code, std::vector<int>& codes) {
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

// What backward reads of a call: nothing, the coefficients, or all of its tensors (functions.py: _kept).
enum Keeps { kNothing, kValues, kAll };

Keeps keeps(const Terms& t) {
  const bool linear = t.call.formula == 0 && !t.call.use_pred && t.m_uncond == nullptr;
  if (!linear || t.values_want_gradient()) return kAll;
  return t.values.empty() ? kNothing : kValues;
}

// function(ready, [mask,] *tensors): ties the results to a Function that has nothing left to compute. ready = (call,
// what to keep, results), with call = (numbers, how many h, dtype codes of map's outputs, `more`, dtypes of the
// tensors), the tensors in the order of genkern/spec.py.
py::object differentiable(PyObject* function, const Terms& t, const std::vector<int>& codes, int64_t kind,
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

// map_row(row, x, m, m_uncond, h, noise, out, dtypes, draw): fused.apply_row of tensors, or None.
PyObject* map_row(PyObject*, PyObject* const* given, Py_ssize_t n) {
  return answer([&]() -> py::object {
    if (n != 9 || !undisturbed()) return {};
    PyObject *const noise = given[5], *const out = given[6];
    Terms t;
    if (!set_terms(given[1], given[2], given[3], given[4], noise, t)) return {};
    if (!set_row(given[0], noise, PyLong_AsLong(given[8]), t)) return {};
    std::vector<int> codes;
    if (!read_codes(given[7], t.n_out, dtype_code(t.like_view.element), codes)) return {};
    const bool gradients = grad_enabled() && t.wants_gradient();
    if (out == Py_None) {
      if (!gradients) return map_to_new(t, codes);
      // The formula's path values get their gradients from torch (coefficients.py).
      if (map_function == nullptr || (t.call.formula != 0 && t.values_want_gradient())) return {};
      const py::object outs = map_to_new(t, codes);
      return outs ? differentiable(map_function, t, codes, 0, Py_False, outs, false) : py::object();
    }
    if (gradients || t.z_unread) return {};
    py::object outs = set_outputs(out, codes, t.call);
    if (!outs) return {};
    const MapArgs args = make_args(t.call);
    // Counted between the checks and the kernel: no error may follow what is written.
    return count_version(outs) && launch_map(args, t.like_view) ? outs : py::object();
  });
}

// map_numbers(numbers, out, tensors): calls.run_ready, True, or None.
PyObject* map_numbers(PyObject*, PyObject* const* given, Py_ssize_t n) {
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

bool is_shape(PyObject* shape) {
  if (!PyTuple_Check(shape) && !PyList_CheckExact(shape)) return false;
  for (Py_ssize_t d = 0; d < PySequence_Fast_GET_SIZE(shape); ++d)
    if (!PyLong_CheckExact(PySequence_Fast_GET_ITEM(shape, d))) return false;
  return true;
}

bool has_shape(const View& view, PyObject* shape) {
  if (PySequence_Fast_GET_SIZE(shape) != view.ndim) return false;
  for (int32_t d = 0; d < view.ndim; ++d)
    if (PyLong_AsLongLong(PySequence_Fast_GET_ITEM(shape, d)) != view.sizes[d]) return false;
  return true;
}

// draw(shape, noise, device, dtype, out, kind): random numbers alone, or None.
PyObject* draw(PyObject*, PyObject* const* given, Py_ssize_t n) {
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

// A reduction's arguments but for the sums, and its new residual, in m's dtype; null where something is not plain.
py::object set_residual(Terms& t, int64_t kind, ReduceArgs& args) {
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

PyObject* arithmetic(const ReduceArgs& args) { return torch_side().dtypes[args.map.f64 ? 3 : 0]; }

// The terms, the mask and the row of a reduction; whether a gradient is asked for.
bool set_reduction(PyObject* const* given, PyObject* function, Terms& t, bool& gradients) {
  PyObject* const noise = given[5];
  if (!undisturbed() || !set_terms(given[1], given[2], given[3], given[4], noise, t)) return false;
  if (!add_view(given[6], t.mask, t.call.mask)) return false;
  if (t.call.mask && t.call.mask->element != Element::boolean) return false;  // numbers are looked at in Python
  if (!set_row(given[0], noise, 1, t) || t.n_out != 1) return false;
  gradients = grad_enabled() && t.wants_gradient();
  return !gradients || (function != nullptr && (t.call.formula == 0 || !t.values_want_gradient()));
}

// reduce_row(row, x, m, m_uncond, h, noise, mask, kind, scratch): fused.reduce_row of tensors, or None.
PyObject* reduce_row(PyObject*, PyObject* const* given, Py_ssize_t n) {
  return answer([&]() -> py::object {
    Terms t;
    bool gradients = false;
    if (n != 9 || !set_reduction(given, reduce_function, t, gradients)) return {};
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
    return gradients ? differentiable(reduce_function, t, {}, kind, given[8], results, true) : results;
  });
}

// A number a sample that is no part of the graph; one whose gradient is asked for goes elsewhere.
bool set_weight(PyObject* weight, const View& like, Value& to) {
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

// A reduction of which the total alone is wanted: the residual stands where the state does, and is not written.
bool set_unwritten(Terms& t, int64_t kind, ReduceArgs& args) {
  if (kind < 0 || kind > 1 || dtype_code(t.like_view.element) < 0) return false;
  t.call.out.push_back(t.like_view);
  args.map = make_args(t.call);
  args.map.out[0].data = nullptr;
  args.rho = static_cast<Rho>(kind);
  return true;
}

// Whether m alone wants a gradient, and it is the residual times m's coefficient.
bool wants_of_m_alone(const Terms& t) {
  if (t.m == nullptr || !requires_grad(t.m) || keeps(t) == kAll) return false;
  for (PyObject* other : {t.x, t.z, t.h[0], t.h[1], t.h[2]})
    if (other != nullptr && requires_grad(other)) return false;
  return true;
}

// m's coefficient is in the residual: 1 is what is left of it.
void without_coefficient_of_m(Terms& t) {
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

// loss_row(row, x, m, m_uncond, h, noise, mask, kind, scale, weight): scale times the weighted sum over all samples of
// what reduce_row sums, or None.
PyObject* loss_row(PyObject*, PyObject* const* given, Py_ssize_t n) {
  return answer([&]() -> py::object {
    Terms t;
    bool gradients = false;
    ReduceArgs args;
    if (n != 10 || !number_of(given[8], args.total_scale) || !set_reduction(given, loss_function, t, gradients))
      return {};
    const int64_t kind = PyLong_AsLong(given[7]);
    py::object residual;
    if (gradients) {
      residual = set_residual(t, kind, args);
      if (!residual) return {};
    } else if (!set_unwritten(t, kind, args)) {
      return {};
    }
    const View& like = t.like_view;
    if (!set_weight(given[9], like, args.weight)) return {};
    const py::object loss = new_scalar(t.like, arithmetic(args));
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
        differentiable(loss_function, t, {}, kind, more.ptr(), py::make_tuple(residual, loss), true);
    return py::reinterpret_borrow<py::object>(PyTuple_GET_ITEM(tied.ptr(), 1));
  });
}

// connect(parts): a dict of what Torch names; True where this torch has what the calls need.
PyObject* connect(PyObject*, PyObject* parts) {
  Torch& torch = torch_side();
  Torch found;
  const auto set = [parts](PyObject*& to, const char* name) {
    to = PyDict_GetItemString(parts, name);
    Py_XINCREF(to);
    return to != nullptr;
  };
  PyObject *dtypes = nullptr, *capsule = nullptr, *address = nullptr;
  if (!set(found.tensor, "tensor") || !set(found.parameter, "parameter") || !set(found.row, "row") ||
      !set(found.out, "out") || !set(found.ddim_row, "ddim_row") || !set(found.scaled, "scaled") ||
      !set(found.noise, "noise") || !set(found.empty, "empty") || !set(found.empty_like, "empty_like") ||
      !set(found.empty_strided, "empty_strided") || !set(found.is_neg, "is_neg") ||
      !set(found.increment_version, "increment_version") || !set(found.functorch, "functorch") ||
      !set(found.tracing, "tracing") || !set(found.dispatch_modes, "dispatch_modes") ||
      !set(found.function_modes, "function_modes") || !set(found.forward_levels, "forward_levels") ||
      !set(found.grad_enabled, "grad_enabled") || !set(loss_function, "loss_function") ||
      !set(map_function, "map_function") || !set(reduce_function, "reduce_function") || !set(dtypes, "dtypes") ||
      !set(capsule, "exchange_api") || !set(address, "launcher")) {
    PyErr_SetString(PyExc_KeyError, "connect: a part is missing");
    return nullptr;
  }
  for (Py_ssize_t code = 0; code < 4; ++code)
    found.dtypes[static_cast<size_t>(code)] = Py_NewRef(PyTuple_GetItem(dtypes, code));
  found.api = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule, dlpack::kExchangeApi));
  found.launcher = static_cast<const Launcher*>(PyLong_AsVoidPtr(address));
  if (PyErr_Occurred() != nullptr) return nullptr;
  const bool fits = found.api->version.major == 1 && found.api->tensor_from_object != nullptr &&
                    found.launcher->map_bytes == sizeof(MapArgs) && found.launcher->reduce_bytes == sizeof(ReduceArgs);
  if (fits) torch = found;
  return PyBool_FromLong(fits);
}

PyObject* count(PyObject*, PyObject*) { return PyLong_FromLongLong(calls); }

template <PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)>
constexpr PyMethodDef fast(const char* name, const char* described) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, described};
}

PyMethodDef methods[] = {
    {"connect", connect, METH_O, "Hands over what the eager calls need of torch; whether this torch has it."},
    {"eager_calls", count, METH_NOARGS, "How many calls went past torch's dispatcher so far."},
    fast<map_row>("map_row", "map_row(row, x, m, m_uncond, h, noise, out, dtypes, draw), or None."),
    fast<map_numbers>("map_numbers", "map_numbers(numbers, out, tensors): True, or None."),
    fast<draw>("draw", "draw(shape, noise, device, dtype, out, kind), or None."),
    fast<loss_row>("loss_row", "loss_row(row, x, m, m_uncond, h, noise, mask, kind, scale, weight), or None."),
    fast<reduce_row>("reduce_row", "reduce_row(row, x, m, m_uncond, h, noise, mask, kind, scratch), or None."),
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

void add_eager(PyObject* module) {
  if (PyModule_AddFunctions(module, methods) != 0) throw py::error_already_set();
}

}  // namespace genkern
