// From a Python object (a NumPy array, or anything that speaks DLPack) to a View, and what keeps it alive.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <deque>
#include <optional>
#include <vector>

#include "../faces/call.h"
#include "dlpack.h"

namespace genkern {

namespace py = pybind11;

inline Element dlpack_element(const dlpack::DataType& dtype) {
  if (dtype.lanes != 1) return Element::other;
  switch (dtype.code) {
    case dlpack::kFloat:
      return dtype.bits == 16   ? Element::f16
             : dtype.bits == 32 ? Element::f32
             : dtype.bits == 64 ? Element::f64
                                : Element::other;
    case dlpack::kBfloat: return dtype.bits == 16 ? Element::bf16 : Element::other;
    case dlpack::kBool: return dtype.bits == 8 ? Element::boolean : Element::other;
    case dlpack::kInt: return dtype.bits == 64 ? Element::int64 : Element::other;
    default: return Element::other;
  }
}

// The views of one call. Sizes and strides are copied; objects and capsules are held until the call has ended (on CUDA,
// until the work is queued on the stream that its arrays are ordered by).
class Views {
 public:
  // stream: the CUDA stream of the work, which producers are asked to order their data by. None: the current one of the
  // first array that can say which that is (the exchange API), else the legacy default stream, 1.
  explicit Views(std::optional<intptr_t> stream) : stream_(stream) {}
  Views(const Views&) = delete;
  Views& operator=(const Views&) = delete;

  ~Views() {
    for (dlpack::Managed* m : managed_)
      if (m->deleter != nullptr) m->deleter(m);
    for (dlpack::ManagedVersioned* m : versioned_)
      if (m->deleter != nullptr) m->deleter(m);
  }

  // The stream to queue the work on, once all arrays are known.
  intptr_t stream() const { return stream_.value_or(1); }

  View of(const py::handle& object, const char* name, bool output = false) {
    if (py::isinstance<py::array>(object)) return of_numpy(py::reinterpret_borrow<py::array>(object), name, output);
    const py::handle type = py::type::handle_of(object);
    if (py::hasattr(type, "__dlpack_c_exchange_api__")) return of_exchange(object, type, name);
    if (py::hasattr(object, "__dlpack__")) return of_capsule(object, name, output);
    throw py::type_error(std::string(name) + ": expected a NumPy array or an object with __dlpack__, got " +
                         py::str(py::type::handle_of(object)).cast<std::string>());
  }

  MaybeView maybe(const py::object& object, const char* name) {
    return object.is_none() ? MaybeView() : MaybeView(of(object, name));
  }

  std::vector<View> all(const std::vector<py::object>& objects, const char* name, bool output = false) {
    std::vector<View> views;
    for (const py::object& object : objects) views.push_back(of(object, name, output));
    return views;
  }

 private:
  View of_numpy(const py::array& array, const char* name, bool output) {
    if (output && !array.writeable()) throw py::value_error(std::string(name) + ": expected a writeable array");
    View view;
    view.data = const_cast<void*>(array.data());
    view.element = numpy_element(array.dtype());
    std::vector<int64_t> shape, strides;
    for (py::ssize_t d = 0; d < array.ndim(); ++d) {
      expect(array.strides(d) % array.itemsize() == 0, name, ": expected strides of whole elements");
      shape.push_back(array.shape(d));
      strides.push_back(array.strides(d) / array.itemsize());
    }
    keep(view, std::move(shape), std::move(strides));
    return view;
  }

  static Element numpy_element(const py::dtype& dtype) {
    if (dtype.kind() == 'f' && dtype.byteorder() != '>') {
      if (dtype.itemsize() == 2) return Element::f16;
      if (dtype.itemsize() == 4) return Element::f32;
      if (dtype.itemsize() == 8) return Element::f64;
    }
    if (dtype.kind() == 'b') return Element::boolean;
    if (dtype.kind() == 'i' && dtype.itemsize() == 8) return Element::int64;
    if (dtype.itemsize() == 2 && py::str(dtype.attr("name")).cast<std::string>() == "bfloat16") return Element::bf16;
    return Element::other;
  }

  View of_exchange(const py::handle& object, const py::handle& type, const char* name) {
    const py::object capsule = type.attr("__dlpack_c_exchange_api__");
    const auto* api = static_cast<dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), dlpack::kExchangeApi));
    if (api == nullptr) throw py::error_already_set();
    if (api->tensor_from_object != nullptr) {
      dlpack::Tensor tensor{};
      if (api->tensor_from_object(object.ptr(), &tensor) != 0) throw py::error_already_set();
      follow_stream(*api, tensor.device);
      return of_tensor(tensor, name);
    }
    dlpack::ManagedVersioned* managed = nullptr;
    if (api->managed_from_object(object.ptr(), &managed) != 0) throw py::error_already_set();
    versioned_.push_back(managed);
    follow_stream(*api, managed->tensor.device);
    return of_tensor(managed->tensor, name);
  }

  // The exchange API orders nothing by itself: work goes where its producer works.
  void follow_stream(const dlpack::ExchangeApi& api, const dlpack::Device& device) {
    if (stream_ || device.type != dlpack::kCuda || api.current_work_stream == nullptr) return;
    void* current = nullptr;
    if (api.current_work_stream(device.type, device.id, &current) != 0) throw py::error_already_set();
    stream_ = reinterpret_cast<intptr_t>(current);
  }

  View of_capsule(const py::handle& object, const char* name, bool output) {
    const auto device = object.attr("__dlpack_device__")().cast<std::pair<int32_t, int32_t>>();
    const bool cuda = device.first == dlpack::kCuda || device.first == dlpack::kCudaManaged;
    py::object queue = py::none();
    if (cuda) queue = py::int_(stream());
    py::object capsule;
    try {
      capsule = object.attr("__dlpack__")(py::arg("stream") = queue, py::arg("max_version") = py::make_tuple(1, 0));
    } catch (py::error_already_set& error) {
      if (!error.matches(PyExc_TypeError)) throw;  // a producer older than DLPack 1.0
      capsule = object.attr("__dlpack__")(py::arg("stream") = queue);
    }
    if (PyCapsule_IsValid(capsule.ptr(), "dltensor_versioned")) {
      auto* managed = static_cast<dlpack::ManagedVersioned*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor_versioned"));
      PyCapsule_SetName(capsule.ptr(), "used_dltensor_versioned");
      versioned_.push_back(managed);
      expect(!output || (managed->flags & dlpack::kReadOnly) == 0, name, ": expected a writeable array");
      return of_tensor(managed->tensor, name);
    }
    auto* managed = static_cast<dlpack::Managed*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
    if (managed == nullptr) throw py::error_already_set();
    PyCapsule_SetName(capsule.ptr(), "used_dltensor");
    managed_.push_back(managed);
    return of_tensor(managed->tensor, name);
  }

  View of_tensor(const dlpack::Tensor& tensor, const char* name) {
    const bool cuda = tensor.device.type == dlpack::kCuda || tensor.device.type == dlpack::kCudaManaged;
    expect(cuda || tensor.device.type == dlpack::kCpu || tensor.device.type == dlpack::kCudaHost, name,
           ": expected an array on the CPU or on a CUDA device");
    View view;
    view.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
    view.device = {cuda, tensor.device.id};
    view.element = dlpack_element(tensor.dtype);
    std::vector<int64_t> shape(tensor.shape, tensor.shape + tensor.ndim), strides(tensor.ndim);
    int64_t step = 1;
    for (int32_t d = tensor.ndim - 1; d >= 0; --d) {
      strides[d] = tensor.strides != nullptr ? tensor.strides[d] : step;
      step *= shape[d];
    }
    keep(view, std::move(shape), std::move(strides));
    return view;
  }

  void keep(View& view, std::vector<int64_t> shape, std::vector<int64_t> strides) {
    numbers_.push_back(std::move(shape));
    view.ndim = static_cast<int32_t>(numbers_.back().size());
    view.sizes = numbers_.back().data();
    numbers_.push_back(std::move(strides));
    view.strides = numbers_.back().data();
  }

  std::optional<intptr_t> stream_;
  std::deque<std::vector<int64_t>> numbers_;
  std::vector<dlpack::Managed*> managed_;
  std::vector<dlpack::ManagedVersioned*> versioned_;
};

}  // namespace genkern
