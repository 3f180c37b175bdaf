// DLPack's structures, as its specification (1.2) lays them out: what __dlpack__ capsules and the C exchange API hold.
#pragma once

#include <cstdint>

namespace genkern::dlpack {

struct Version {
  uint32_t major, minor;
};

enum DeviceType : int32_t { kCpu = 1, kCuda = 2, kCudaHost = 3, kCudaManaged = 13 };
enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kComplex = 5, kBool = 6 };

struct Device {
  int32_t type, id;
};

struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; null: C order
  uint64_t byte_offset;
};

struct Managed {
  Tensor tensor;
  void* context;
  void (*deleter)(Managed*);
};

constexpr uint64_t kReadOnly = 1;

struct ManagedVersioned {
  Version version;
  void* context;
  void (*deleter)(ManagedVersioned*);
  uint64_t flags;
  Tensor tensor;
};

// type(x).__dlpack_c_exchange_api__ is a capsule of this name that holds an ExchangeApi.
constexpr const char* kExchangeApi = "dlpack_exchange_api";

struct ExchangeApi {
  Version version;
  ExchangeApi* previous;
  void* allocate;
  int (*managed_from_object)(void* object, ManagedVersioned** out);
  void* to_object;
  int (*tensor_from_object)(void* object, Tensor* out);  // may be null; the tensor is borrowed from the object
  int (*current_work_stream)(int32_t device_type, int32_t device_id, void** out);
};

}  // namespace genkern::dlpack
