// genkern._arrays, the eager half: calls on plain torch tensors past torch's dispatcher, whose boxed interface costs
// more than the rest of a small call. The same checks (faces/call.h) and the same kernels, through torch's threads,
// streams and allocator; None wherever anything is not plain, and genkern/fused.py (ops.py) then goes its way through
// Python.
#include "eager.h"

#include "losses.h"
#include "maps.h"

namespace genkern {
namespace {

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
      !set(found.grad_enabled, "grad_enabled") || !set(found.debug, "debug") ||
      !set(answers().loss_function, "loss_function") || !set(answers().map_function, "map_function") ||
      !set(answers().reduce_function, "reduce_function") || !set(dtypes, "dtypes") || !set(capsule, "exchange_api") ||
      !set(address, "launcher")) {
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

PyObject* count(PyObject*, PyObject*) { return PyLong_FromLongLong(answers().count); }

template <PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)>
constexpr PyMethodDef fast(const char* name, const char* described) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, described};
}

PyMethodDef methods[] = {
    {"connect", connect, METH_O, "Hands over what the eager calls need of torch; whether this torch has it."},
    {"eager_calls", count, METH_NOARGS, "How many calls went past torch's dispatcher so far."},
    fast<map_row>("map_row", "map_row(row, x, m, m_uncond, h, noise, out, dtypes, draw), or None."),
    fast<ddim>("ddim",
               "ddim(x, m, m_uncond, noise, out, prediction, alpha_t, sigma_t, alpha_s, sigma_s, eta, clip, guidance, "
               "return_pred), or None."),
    fast<linear>("linear",
                 "linear(x, m, m_uncond, h, noise, out, c_x, c_m, c_h, c_z, guidance, factor, low), or None."),
    fast<map_numbers>("map_numbers", "map_numbers(numbers, out, tensors): True, or None."),
    fast<draw>("draw", "draw(shape, noise, device, dtype, out, kind), or None."),
    fast<loss_row>("loss_row", "loss_row(row, x, m, m_uncond, h, noise, mask, kind, scale, weight), or None."),
    fast<path_loss>(
        "path_loss",
        "path_loss(model_output, x, x_coef, noise_coef, noise, m_coef, h, h_coefs, weight, kind, reduction), "
        "or None."),
    fast<reduce_row>("reduce_row", "reduce_row(row, x, m, m_uncond, h, noise, mask, kind, scratch), or None."),
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

void add_eager(PyObject* module) {
  if (PyModule_AddFunctions(module, methods) != 0) throw py::error_already_set();
}

}  // namespace genkern
