// torch.ops.genkern.*: schemas, allocation, device and stream, on the LibTorch stable ABI (no ATen header).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../faces/numbers.h"
#include "../faces/stat.h"
#include "launch.h"
#include "launch_stat.h"
#include "tensors.h"

namespace {

using genkern::Call;
using Ints = std::vector<int64_t>;
using Floats = std::vector<double>;

void run_map(const Call& call, const Tensor& like) {
  const auto [on_cuda, device] = genkern::place(like);
  genkern::launch_map(genkern::make_args(call), on_cuda, device);
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
  const auto [on_cuda, device] = genkern::place(residual);
  genkern::launch_reduce(args, on_cuda, device);
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

Tensor stat(MaybeTensor x, MaybeTensor m, MaybeTensor m_uncond, Tensors h, MaybeTensor z, Floats row, MaybeTensor table,
            MaybeTensor index, Tensors values, Ints cells, Floats scales, int64_t formula, int64_t noise, Ints key,
            MaybeTensor device_key, MaybeTensor sample_ids, bool use_pred, int64_t outs, int64_t kind, double atol,
            double rtol) {
  const Call call{view(x),     view(m),        view(m_uncond),   view(h),          view(z),           std::move(row),
                  view(table), view(index),    view(values),     std::move(cells), std::move(scales), formula,
                  noise,       std::move(key), view(device_key), view(sample_ids), use_pred,          {},
                  {}};
  const Tensor* like = like_of(x, m, z);
  expect(like != nullptr, "x: expected x, m or z");
  genkern::StatArgs args = genkern::make_stat_args(call, outs, kind, atol, rtol);
  const int64_t sizes[2] = {args.map.sizes[0], genkern::sums_of(args.kind, args.map.n_out)}, strides[2] = {sizes[1], 1};
  Tensor sums = empty_strided(*like, 2, sizes, strides, ScalarType::Double);
  args.sums = static_cast<double*>(sums.data_ptr());
  const auto [on_cuda, device] = genkern::place(*like);
  genkern::launch_stat(args, on_cuda, device);
  return sums;
}

Tensor stat_quantile(MaybeTensor x, MaybeTensor m, MaybeTensor m_uncond, Tensors h, MaybeTensor z, Floats row,
                     MaybeTensor table, MaybeTensor index, Tensors values, Ints cells, Floats scales, int64_t formula,
                     int64_t noise, Ints key, MaybeTensor device_key, MaybeTensor sample_ids, bool use_pred, double q) {
  const Call call{view(x),     view(m),        view(m_uncond),   view(h),          view(z),           std::move(row),
                  view(table), view(index),    view(values),     std::move(cells), std::move(scales), formula,
                  noise,       std::move(key), view(device_key), view(sample_ids), use_pred,          {},
                  {}};
  const Tensor* like = like_of(x, m, z);
  expect(like != nullptr, "x: expected x, m or z");
  genkern::QuantileArgs args = genkern::make_quantile_args(call, q);
  const int64_t sizes[1] = {args.map.sizes[0]}, strides[1] = {1};
  Tensor out = empty_strided(*like, 1, sizes, strides, args.map.f64 ? ScalarType::Double : ScalarType::Float);
  args.out = out.data_ptr();
  const auto [on_cuda, device] = genkern::place(*like);
  genkern::launch_quantile(args, on_cuda, device);
  return out;
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
  library.def(("stat(" + inputs + ", int outs, int kind, float atol, float rtol) -> Tensor").c_str());
  library.def(("stat_quantile(" + inputs + ", float q) -> Tensor").c_str());
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
  library.impl("stat", TORCH_BOX(&stat));
  library.impl("stat_quantile", TORCH_BOX(&stat_quantile));
  library.impl("map_numbers", TORCH_BOX(&map_numbers));
  library.impl("reduce_numbers", TORCH_BOX(&reduce_numbers));
  library.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  library.impl("has_cuda", TORCH_BOX(&has_cuda));
  library.impl("launcher", TORCH_BOX(&genkern::launcher));
}
