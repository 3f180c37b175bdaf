// torch.ops.genkern.*: schemas, allocation, device and stream, on the LibTorch stable ABI (no ATen header).
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../faces/call.h"
#include "../faces/launch.h"
#include "../faces/numbers.h"

// torch 2.13 gave the check of a shim call this name; the older headers have it as TORCH_ERROR_CODE_CHECK only.
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

#ifdef GENKERN_WITH_CUDA
// Weak, so that the library also loads under a torch without CUDA.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream)
    __attribute__((weak));
#endif

namespace {

using genkern::Call;
using genkern::Element;
using genkern::expect;
using genkern::View;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;
using Ints = std::vector<int64_t>;
using Floats = std::vector<double>;

Element element_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return Element::f32;
    case ScalarType::Half: return Element::f16;
    case ScalarType::BFloat16: return Element::bf16;
    case ScalarType::Double: return Element::f64;
    case ScalarType::Bool: return Element::boolean;
    case ScalarType::Long: return Element::int64;
    default: return Element::other;
  }
}

ScalarType scalar_type(int64_t code) {
  switch (code) {
    case 0: return ScalarType::Float;
    case 1: return ScalarType::Half;
    case 2: return ScalarType::BFloat16;
    case 3: return ScalarType::Double;
    default: break;
  }
  expect(false, "out_dtypes: expected 0 (float32), 1 (float16), 2 (bfloat16) or 3 (float64), got ", code);
  return ScalarType::Float;
}

View view(const Tensor& t) {
  return {t.data_ptr(),
          element_of(t.scalar_type()),
          {t.is_cuda(), t.is_cuda() ? t.get_device_index() : 0},
          static_cast<int32_t>(t.dim()),
          t.sizes().data(),
          t.strides().data()};
}

genkern::MaybeView view(const MaybeTensor& t) { return t ? genkern::MaybeView(view(*t)) : std::nullopt; }

std::vector<View> view(const Tensors& ts) {
  std::vector<View> views;
  views.reserve(ts.size());
  for (const Tensor& t : ts) views.push_back(view(t));
  return views;
}

int32_t shim_code(ScalarType type) {
  switch (type) {
    case ScalarType::Half: return aoti_torch_dtype_float16();
    case ScalarType::BFloat16: return aoti_torch_dtype_bfloat16();
    case ScalarType::Double: return aoti_torch_dtype_float64();
    default: return aoti_torch_dtype_float32();
  }
}

// Allocates past the dispatcher, which takes as long as the rest of a small call.
Tensor empty_strided(const Tensor& on, int32_t ndim, const int64_t* sizes, const int64_t* strides, ScalarType dtype) {
  int32_t device_type = 0;
  AtenTensorHandle found = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(on.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(ndim, sizes, strides, shim_code(dtype), device_type, on.get_device_index(), &found));
  return Tensor(found);
}

// Allocates like t, in another dtype: a dense tensor's strides are kept.
Tensor empty_like(const Tensor& t, ScalarType dtype) {
  const View like = view(t);
  if (like.contiguous()) return empty_strided(t, like.ndim, like.sizes, like.strides, dtype);
  using torch::stable::detail::from;
  std::array<StableIValue, 6> stack{from(t),
                                    from(std::optional<ScalarType>(dtype)),
                                    from(std::nullopt),
                                    from(std::nullopt),
                                    from(std::nullopt),
                                    from(std::nullopt)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::empty_like", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

const genkern::Parallel kTorchThreads{
    [](int64_t count, int64_t grain, void* context, void (*body)(void*, int64_t, int64_t)) {
      torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { body(context, begin, end); });
    }};

// Runs cpu() or cuda(stream), the latter on the device and its current stream.
template <typename Cpu, typename Cuda>
void run_on(bool on_cuda, [[maybe_unused]] int32_t device, Cpu cpu, [[maybe_unused]] Cuda cuda) {
  if (!on_cuda) return cpu();
#ifdef GENKERN_WITH_CUDA
  expect(aoti_torch_get_current_cuda_stream != nullptr, "x: this torch has no CUDA");
  torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const char* error = cuda(stream);
  expect(error == nullptr, "genkern: the kernel could not be launched: ", error);
#else
  expect(false, "x: is on a CUDA device, but genkern was built without CUDA; rebuild it where nvcc is found");
#endif
}

void launch_map(const genkern::MapArgs& args, bool on_cuda, int32_t device) {
  run_on(
      on_cuda, device, [&] { genkern::map_cpu(args, kTorchThreads); },
      [&]([[maybe_unused]] void* stream) -> const char* {
#ifdef GENKERN_WITH_CUDA
        return genkern::map_cuda(args, stream);
#else
        return nullptr;
#endif
      });
}

// Memory of a call: torch's on CUDA, where it is reused in the stream's order.
class Workspace {
 public:
  Workspace(size_t bytes, bool on_cuda) {
    if (!on_cuda) {
      host_.resize(bytes / sizeof(double) + 1);
      return;
    }
    const int64_t count = static_cast<int64_t>(bytes / sizeof(double) + 1), step = 1;
    AtenTensorHandle found = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(1, &count, &step, aoti_torch_dtype_float64(), aoti_torch_device_type_cuda(),
                                 torch::stable::accelerator::getCurrentDeviceIndex(), &found));
    device_ = Tensor(found);
  }
  void* data() { return device_ ? device_->data_ptr() : host_.data(); }

 private:
  std::vector<double> host_;
  MaybeTensor device_;
};

size_t workspace_bytes(const genkern::MapArgs& args, [[maybe_unused]] bool on_cuda) {
#ifdef GENKERN_WITH_CUDA
  if (on_cuda) return genkern::reduce_workspace_cuda(args);
#endif
  return genkern::reduce_workspace_cpu(args);
}

const char* reduce_there(const genkern::ReduceArgs& args, [[maybe_unused]] bool on_cuda,
                         [[maybe_unused]] void* stream) {
#ifdef GENKERN_WITH_CUDA
  if (on_cuda) return genkern::reduce_cuda(args, stream);
#endif
  genkern::reduce_cpu(args, kTorchThreads);
  return nullptr;
}

void launch_reduce(genkern::ReduceArgs& args, bool on_cuda, int32_t device) {
  const auto run = [&](void* stream) {
    Workspace workspace(workspace_bytes(args.map, on_cuda), on_cuda);
    args.workspace = workspace.data();
    return reduce_there(args, on_cuda, stream);
  };
  run_on(on_cuda, device, [&] { run(nullptr); }, run);
}

// The sums over the samples, then scale times their sum: a reduction of one sample of B elements, in place, and a copy
// of the first of its two numbers.
void launch_loss(genkern::ReduceArgs& args, double scale, void* total, bool on_cuda, int32_t device) {
  const genkern::Element element = args.map.f64 ? Element::f64 : Element::f32;
  const int64_t batch = args.map.sizes[0], sizes[2] = {1, batch}, strides[2] = {2 * batch, 2};
  [[maybe_unused]] const int64_t one = 1;
  const auto run = [&](void* stream) -> const char* {
    const size_t sums_bytes = 2 * sizeof(double) * static_cast<size_t>(batch + 1);
    const genkern::Device place{on_cuda, device};
    Call over_batch;
    over_batch.row.assign(genkern::kFirstOut + genkern::kOutCells, 0.0);
    over_batch.row[genkern::kW] = 1.0;
    over_batch.row[genkern::kFirstOut + genkern::kOutX] = scale;
    over_batch.x = View{total, element, place, 2, sizes, strides};
    over_batch.out = {*over_batch.x};
    genkern::ReduceArgs sum;
    sum.map = genkern::make_args(over_batch);
    sum.rho = genkern::Rho::absolute;
    const size_t bytes = std::max(workspace_bytes(args.map, on_cuda), workspace_bytes(sum.map, on_cuda));
    Workspace workspace(sums_bytes + bytes, on_cuda);
    auto* memory = static_cast<char*>(workspace.data());
    args.sums = memory;
    sum.map.in[genkern::kX].data = sum.map.out[0].data = memory;
    sum.sums = memory + 2 * genkern::element_size(element) * batch;
    args.workspace = sum.workspace = memory + sums_bytes;
    if (const char* error = reduce_there(args, on_cuda, stream)) return error;
    if (const char* error = reduce_there(sum, on_cuda, stream)) return error;
    if (!on_cuda) {
      std::memcpy(total, sum.sums, static_cast<size_t>(genkern::element_size(element)));
      return nullptr;
    }
#ifdef GENKERN_WITH_CUDA
    over_batch.row[genkern::kFirstOut + genkern::kOutX] = 1.0;
    over_batch.x = View{sum.sums, element, place, 1, &one, &one};
    over_batch.out = {View{total, element, place, 1, &one, &one}};
    return genkern::map_cuda(genkern::make_args(over_batch), stream);
#else
    return nullptr;
#endif
  };
  run_on(on_cuda, device, [&] { run(nullptr); }, run);
}

// The device of a tensor that has a kernel: whether it is a CUDA one, and its index.
std::pair<bool, int32_t> place(const Tensor& t) {
  expect(t.is_cpu() || t.is_cuda(), "x: expected a tensor on the CPU or on a CUDA device");
  return {t.is_cuda(), t.is_cuda() ? t.get_device_index() : 0};
}

template <typename Run>
bool succeeds(Run run) noexcept {
  try {
    run();
    return true;
  } catch (...) {
    return false;
  }
}

const genkern::Launcher kLauncher{
    sizeof(genkern::MapArgs), sizeof(genkern::ReduceArgs),
    [](const genkern::MapArgs& args, bool cuda, int32_t device) noexcept {
      return succeeds([&] { launch_map(args, cuda, device); });
    },
    [](genkern::ReduceArgs& args, bool cuda, int32_t device) noexcept {
      return succeeds([&] { launch_reduce(args, cuda, device); });
    },
    [](genkern::ReduceArgs& args, double scale, void* total, bool cuda, int32_t device) noexcept {
      return succeeds([&] { launch_loss(args, scale, total, cuda, device); });
    }};

int64_t launcher() { return reinterpret_cast<int64_t>(&kLauncher); }

void run_map(const Call& call, const Tensor& like) {
  const genkern::MapArgs args = genkern::make_args(call);
  const auto [on_cuda, device] = place(like);
  launch_map(args, on_cuda, device);
}

// The tensor whose shape, device and strides the outputs take; null for a row of noise alone.
const Tensor* like_of(const MaybeTensor& x, const MaybeTensor& m, const MaybeTensor& z) {
  return x ? &*x : m ? &*m : z ? &*z : nullptr;
}

Tensors map(MaybeTensor x, MaybeTensor m, MaybeTensor m_uncond, Tensors h, MaybeTensor z, Floats row, MaybeTensor table,
            MaybeTensor index, Tensors values, Ints cells, Floats scales, int64_t formula, int64_t noise, Ints key,
            MaybeTensor device_key, MaybeTensor sample_ids, bool use_pred, Ints out_dtypes, std::optional<Ints> size,
            std::optional<torch::stable::Device> device) {
  const Tensor* like = like_of(x, m, z);
  expect(like != nullptr || (size && device), "x: expected x, m or z, or a size and a device");
  Tensors outs;
  for (const int64_t code : out_dtypes) {
    const ScalarType dtype = scalar_type(code);
    outs.push_back(like != nullptr ? empty_like(*like, dtype)
                                   : torch::stable::empty(*size, dtype, std::nullopt, device));
  }
  expect(!outs.empty(), "out_dtypes: expected 1 to 3 entries, got 0");
  run_map({view(x), view(m), view(m_uncond), view(h), view(z), std::move(row), view(table), view(index), view(values),
           std::move(cells), std::move(scales), formula, noise, std::move(key), view(device_key), view(sample_ids),
           use_pred, std::nullopt, view(outs)},
          outs[0]);
  return outs;
}

void map_out(MaybeTensor x, MaybeTensor m, MaybeTensor m_uncond, Tensors h, MaybeTensor z, Floats row,
             MaybeTensor table, MaybeTensor index, Tensors values, Ints cells, Floats scales, int64_t formula,
             int64_t noise, Ints key, MaybeTensor device_key, MaybeTensor sample_ids, bool use_pred, Tensors out) {
  expect(!out.empty(), "out: expected 1 to 3 outputs, got 0");
  run_map({view(x), view(m), view(m_uncond), view(h), view(z), std::move(row), view(table), view(index), view(values),
           std::move(cells), std::move(scales), formula, noise, std::move(key), view(device_key), view(sample_ids),
           use_pred, std::nullopt, view(out)},
          out[0]);
}

std::tuple<Tensor, Tensor> run_reduce(Call& call, int64_t kind, const MaybeTensor& m, const Tensor* like) {
  expect(like != nullptr, "x: expected x, m or z");
  expect(kind == 0 || kind == 1, "kind: expected 0 (squares) or 1 (absolute values), got ", kind);
  Tensor residual = empty_like(*like, m ? m->scalar_type() : like->scalar_type());
  call.out = {view(residual)};
  genkern::ReduceArgs args;
  args.map = genkern::make_args(call);
  args.rho = static_cast<genkern::Rho>(kind);
  const int64_t sizes[2] = {args.map.sizes[0], 2}, strides[2] = {2, 1};
  Tensor sums = empty_strided(*like, 2, sizes, strides, args.map.f64 ? ScalarType::Double : ScalarType::Float);
  args.sums = sums.data_ptr();
  const auto [on_cuda, device] = place(residual);
  launch_reduce(args, on_cuda, device);
  return {residual, sums};
}

std::tuple<Tensor, Tensor> reduce(MaybeTensor x, MaybeTensor m, MaybeTensor m_uncond, Tensors h, MaybeTensor z,
                                  Floats row, MaybeTensor table, MaybeTensor index, Tensors values, Ints cells,
                                  Floats scales, int64_t formula, int64_t noise, Ints key, MaybeTensor device_key,
                                  MaybeTensor sample_ids, bool use_pred, MaybeTensor mask, int64_t kind) {
  Call call{view(x),     view(m),        view(m_uncond),   view(h),          view(z),           std::move(row),
            view(table), view(index),    view(values),     std::move(cells), std::move(scales), formula,
            noise,       std::move(key), view(device_key), view(sample_ids), use_pred,          view(mask),
            {}};
  return run_reduce(call, kind, m, like_of(x, m, z));
}

// The forms below take a call's numbers as one text (the bytes of numbers.h in hexadecimal digits) and h one by one: a
// list costs a microsecond on its way here, even an empty one.
int64_t read(const std::string& numbers, Call& call) {
  const std::string bytes = genkern::bytes_of(numbers.data(), numbers.size());
  return genkern::read_numbers(bytes.data(), bytes.size(), call);
}

void set_arrays(Call& call, const MaybeTensor& x, const MaybeTensor& m, const MaybeTensor& z,
                const MaybeTensor& m_uncond, std::initializer_list<const MaybeTensor*> h, const MaybeTensor& table,
                const MaybeTensor& index, const MaybeTensor& device_key, const MaybeTensor& sample_ids,
                const std::optional<Tensors>& values) {
  call.x = view(x);
  call.m = view(m);
  call.z = view(z);
  call.m_uncond = view(m_uncond);
  for (const MaybeTensor* t : h) {
    if (*t) call.h.push_back(view(**t));
  }
  if (values) call.values = view(*values);
  call.table = view(table);
  call.index = view(index);
  call.device_key = view(device_key);
  call.sample_ids = view(sample_ids);
}

void map_numbers(std::string numbers, Tensor out, MaybeTensor x, MaybeTensor m, MaybeTensor z, MaybeTensor m_uncond,
                 MaybeTensor h0, MaybeTensor h1, MaybeTensor h2, MaybeTensor table, MaybeTensor index,
                 MaybeTensor device_key, MaybeTensor sample_ids, std::optional<Tensors> values, MaybeTensor out1,
                 MaybeTensor out2) {
  Call call;
  read(numbers, call);
  set_arrays(call, x, m, z, m_uncond, {&h0, &h1, &h2}, table, index, device_key, sample_ids, values);
  call.out.push_back(view(out));
  if (out1) call.out.push_back(view(*out1));
  if (out2) call.out.push_back(view(*out2));
  run_map(call, out);
}

std::tuple<Tensor, Tensor> reduce_numbers(std::string numbers, MaybeTensor x, MaybeTensor m, MaybeTensor z,
                                          MaybeTensor m_uncond, MaybeTensor h0, MaybeTensor h1, MaybeTensor h2,
                                          MaybeTensor table, MaybeTensor index, MaybeTensor device_key,
                                          MaybeTensor sample_ids, std::optional<Tensors> values, MaybeTensor mask) {
  Call call;
  const int64_t kind = read(numbers, call);
  set_arrays(call, x, m, z, m_uncond, {&h0, &h1, &h2}, table, index, device_key, sample_ids, values);
  call.mask = view(mask);
  return run_reduce(call, kind, m, like_of(x, m, z));
}

// The CPU instruction set in use; a name selects one (for tests), and is an error where the CPU lacks it.
std::string cpu_isa(std::string select) {
  expect(select.empty() || genkern::select_cpu_isa(select.c_str()), "select: this CPU has no ", select);
  return genkern::cpu_isa();
}

bool has_cuda() {
#ifdef GENKERN_WITH_CUDA
  return true;
#else
  return false;
#endif
}

constexpr const char* kInputsSchema =
    "Tensor? x, Tensor? m, Tensor? m_uncond, Tensor[] h, Tensor? z, float[] row, Tensor? table, Tensor? index, "
    "Tensor[] values, int[] cells, float[] scales, int formula, int noise, int[] key, Tensor? device_key, "
    "Tensor? sample_ids, bool use_pred";
constexpr const char* kArraysSchema =
    "Tensor? x=None, Tensor? m=None, Tensor? z=None, Tensor? m_uncond=None, Tensor? h0=None, Tensor? h1=None, "
    "Tensor? h2=None, Tensor? table=None, Tensor? index=None, Tensor? device_key=None, Tensor? sample_ids=None, "
    "Tensor[]? values=None";

}  // namespace

STABLE_TORCH_LIBRARY(genkern, library) {
  const std::string inputs = kInputsSchema;
  library.def(("map(" + inputs + ", int[] out_dtypes, int[]? size=None, Device? device=None) -> Tensor[]").c_str());
  library.def(("map_out(" + inputs + ", Tensor(a!)[] out) -> ()").c_str());
  library.def(("reduce(" + inputs + ", Tensor? mask, int kind) -> (Tensor, Tensor)").c_str());
  const std::string arrays = kArraysSchema;
  library.def(
      ("map_numbers(str numbers, Tensor(a!) out, " + arrays + ", Tensor(b!)? out1=None, Tensor(c!)? out2=None) -> ()")
          .c_str());
  library.def(("reduce_numbers(str numbers, " + arrays + ", Tensor? mask=None) -> (Tensor, Tensor)").c_str());
  library.def("cpu_isa(str select=\"\") -> str");
  library.def("has_cuda() -> bool");
  library.def("launcher() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(genkern, CompositeExplicitAutograd, library) {
  library.impl("map", TORCH_BOX(&map));
  library.impl("map_out", TORCH_BOX(&map_out));
  library.impl("reduce", TORCH_BOX(&reduce));
  library.impl("map_numbers", TORCH_BOX(&map_numbers));
  library.impl("reduce_numbers", TORCH_BOX(&reduce_numbers));
  library.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  library.impl("has_cuda", TORCH_BOX(&has_cuda));
  library.impl("launcher", TORCH_BOX(&launcher));
}
