// Calls on plain torch tensors in eager mode, past torch's dispatcher (eager.cpp).
#pragma once

#include <pybind11/pybind11.h>

namespace genkern {

// Adds the functions to the module; they do nothing until `connect` has been called.
void add_eager(PyObject* module);

}  // namespace genkern
