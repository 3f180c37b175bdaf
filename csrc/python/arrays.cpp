// genkern._arrays: the kernels on NumPy arrays and on any array that speaks DLPack. No torch here.
//
// Outputs are given by the caller. On CUDA the work is queued on the arrays' device, on `stream`, by default the
// arrays' own (views.h).
#include <pybind11/stl.h>

#include <algorithm>

#include "../faces/stat.h"
#include "eager.h"
#include "views.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

#ifdef GENKERN_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace {

using genkern::Call;
using genkern::expect;
using genkern::Views;
namespace py = pybind11;
using Objects = std::vector<py::object>;
using Ints = std::vector<int64_t>;
using Floats = std::vector<double>;

void run_parallel(int64_t count, int64_t grain, void* context, void (*body)(void*, int64_t, int64_t)) {
#if defined(_OPENMP)
  const int64_t pieces = std::min<int64_t>(omp_get_max_threads(), (count + grain - 1) / grain);
  if (pieces > 1) {
#pragma omp parallel for num_threads(static_cast<int>(pieces)) schedule(static, 1)
    for (int64_t p = 0; p < pieces; ++p) body(context, count * p / pieces, count * (p + 1) / pieces);
    return;
  }
#endif
  body(context, 0, count);
}

const genkern::Parallel kThreads{run_parallel};

#ifdef GENKERN_WITH_CUDA
// run(), with `workspace` pointing to memory for as long as the stream needs it.
template <typename Run>
const char* with_workspace(size_t bytes, void* stream, void*& workspace, Run run) {
  const auto queue = static_cast<cudaStream_t>(stream);
  const cudaError_t got = cudaMallocAsync(&workspace, bytes + 1, queue);
  if (got != cudaSuccess) return cudaGetErrorString(got);
  const char* error = run();
  cudaFreeAsync(workspace, queue);
  return error;
}

// Makes a device current for as long as it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    cudaGetDevice(&before_);
    if (before_ != device) cudaSetDevice(device);
  }
  ~DeviceGuard() { cudaSetDevice(before_); }

 private:
  int before_ = 0;
};
#endif

template <typename Cpu, typename Cuda>
void run_on(const genkern::View& like, [[maybe_unused]] intptr_t stream, Cpu cpu, [[maybe_unused]] Cuda cuda) {
  if (!like.device.cuda) {
    py::gil_scoped_release release;
    cpu();
    return;
  }
#ifdef GENKERN_WITH_CUDA
  const DeviceGuard guard(like.device.index);
  const char* error = cuda(reinterpret_cast<void*>(stream));
  if (error != nullptr) throw std::runtime_error(std::string("genkern: the kernel could not be launched: ") + error);
#else
  expect(false, "x: is on a CUDA device, but genkern was built without CUDA; rebuild it where nvcc is found");
#endif
}

Call make_call(Views& views, const py::object& x, const py::object& m, const py::object& m_uncond, const Objects& h,
               const py::object& z, const Floats& row, const py::object& table, const py::object& index,
               const Objects& values, const Ints& cells, const Floats& scales, int64_t formula, int64_t noise,
               const Ints& key, const py::object& device_key, const py::object& sample_ids, bool use_pred) {
  Call call;
  call.x = views.maybe(x, "x");
  call.m = views.maybe(m, "m");
  call.m_uncond = views.maybe(m_uncond, "m_uncond");
  call.h = views.all(h, "h");
  call.z = views.maybe(z, "z");
  call.row = row;
  call.table = views.maybe(table, "table");
  call.index = views.maybe(index, "index");
  call.values = views.all(values, "values");
  call.cells = cells;
  call.scales = scales;
  call.formula = formula;
  call.noise = noise;
  call.key = key;
  call.device_key = views.maybe(device_key, "device_key");
  call.sample_ids = views.maybe(sample_ids, "sample_ids");
  call.use_pred = use_pred;
  return call;
}

void map_out(const py::object& x, const py::object& m, const py::object& m_uncond, const Objects& h,
             const py::object& z, const Floats& row, const py::object& table, const py::object& index,
             const Objects& values, const Ints& cells, const Floats& scales, int64_t formula, int64_t noise,
             const Ints& key, const py::object& device_key, const py::object& sample_ids, bool use_pred,
             const Objects& out, std::optional<intptr_t> stream) {
  Views views(stream);
  Call call = make_call(views, x, m, m_uncond, h, z, row, table, index, values, cells, scales, formula, noise, key,
                        device_key, sample_ids, use_pred);
  call.out = views.all(out, "out", true);
  const genkern::MapArgs args = genkern::make_args(call);
  run_on(
      genkern::like_of(call), views.stream(), [&] { genkern::map_cpu(args, kThreads); },
      [&]([[maybe_unused]] void* cuda_stream) -> const char* {
#ifdef GENKERN_WITH_CUDA
        return genkern::map_cuda(args, cuda_stream);
#else
        return nullptr;
#endif
      });
}

void reduce_out(const py::object& x, const py::object& m, const py::object& m_uncond, const Objects& h,
                const py::object& z, const Floats& row, const py::object& table, const py::object& index,
                const Objects& values, const Ints& cells, const Floats& scales, int64_t formula, int64_t noise,
                const Ints& key, const py::object& device_key, const py::object& sample_ids, bool use_pred,
                const py::object& mask, int64_t kind, const py::object& residual, const py::object& sums,
                std::optional<intptr_t> stream) {
  expect(kind == 0 || kind == 1, "kind: expected 0 (squares) or 1 (absolute values), got ", kind);
  Views views(stream);
  Call call = make_call(views, x, m, m_uncond, h, z, row, table, index, values, cells, scales, formula, noise, key,
                        device_key, sample_ids, use_pred);
  call.mask = views.maybe(mask, "mask");
  call.out = {views.of(residual, "residual", true)};
  genkern::ReduceArgs args;
  args.map = genkern::make_args(call);
  args.rho = static_cast<genkern::Rho>(kind);
  const genkern::View& like = genkern::like_of(call);
  const genkern::View sums_view = views.of(sums, "sums", true);
  genkern::expect_device(sums_view, like, "sums");
  expect(sums_view.contiguous() && sums_view.numel() == 2 * args.map.sizes[0] &&
             sums_view.element == (args.map.f64 ? genkern::Element::f64 : genkern::Element::f32),
         "sums: expected contiguous [B, 2] of float32 (float64 for float64 states)");
  args.sums = sums_view.data;
  run_on(
      like, views.stream(),
      [&] {
        std::vector<double> workspace(genkern::reduce_workspace_cpu(args.map) / sizeof(double));
        args.workspace = workspace.data();
        genkern::reduce_cpu(args, kThreads);
      },
      [&]([[maybe_unused]] void* cuda_stream) -> const char* {
#ifdef GENKERN_WITH_CUDA
        return with_workspace(genkern::reduce_workspace_cuda(args.map), cuda_stream, args.workspace,
                              [&] { return genkern::reduce_cuda(args, cuda_stream); });
#else
        return nullptr;
#endif
      });
}

void stat_out(const py::object& x, const py::object& m, const py::object& m_uncond, const Objects& h,
              const py::object& z, const Floats& row, const py::object& table, const py::object& index,
              const Objects& values, const Ints& cells, const Floats& scales, int64_t formula, int64_t noise,
              const Ints& key, const py::object& device_key, const py::object& sample_ids, bool use_pred, int64_t outs,
              int64_t kind, double atol, double rtol, const py::object& sums, std::optional<intptr_t> stream) {
  Views views(stream);
  const Call call = make_call(views, x, m, m_uncond, h, z, row, table, index, values, cells, scales, formula, noise,
                              key, device_key, sample_ids, use_pred);
  genkern::StatArgs args = genkern::make_stat_args(call, outs, kind, atol, rtol);
  const genkern::View& like = genkern::like_of(call);
  const genkern::View sums_view = views.of(sums, "sums", true);
  genkern::expect_device(sums_view, like, "sums");
  const int64_t n_sums = genkern::sums_of(args.kind, args.map.n_out);
  expect(sums_view.contiguous() && sums_view.numel() == n_sums * args.map.sizes[0] &&
             sums_view.element == genkern::Element::f64,
         "sums: expected contiguous [B, ", n_sums, "] of float64");
  args.sums = static_cast<double*>(sums_view.data);
  run_on(
      like, views.stream(),
      [&] {
        std::vector<double> workspace(genkern::stat_workspace_cpu(args.map) / sizeof(double));
        args.workspace = workspace.data();
        genkern::stat_cpu(args, kThreads);
      },
      [&]([[maybe_unused]] void* cuda_stream) -> const char* {
#ifdef GENKERN_WITH_CUDA
        return with_workspace(genkern::stat_workspace_cuda(args.map), cuda_stream, args.workspace,
                              [&] { return genkern::stat_cuda(args, cuda_stream); });
#else
        return nullptr;
#endif
      });
}

void quantile_out(const py::object& x, const py::object& m, const py::object& m_uncond, const Objects& h,
                  const py::object& z, const Floats& row, const py::object& table, const py::object& index,
                  const Objects& values, const Ints& cells, const Floats& scales, int64_t formula, int64_t noise,
                  const Ints& key, const py::object& device_key, const py::object& sample_ids, bool use_pred, double q,
                  const py::object& out, std::optional<intptr_t> stream) {
  Views views(stream);
  const Call call = make_call(views, x, m, m_uncond, h, z, row, table, index, values, cells, scales, formula, noise,
                              key, device_key, sample_ids, use_pred);
  genkern::QuantileArgs args = genkern::make_quantile_args(call, q);
  const genkern::View& like = genkern::like_of(call);
  const genkern::View out_view = views.of(out, "out", true);
  genkern::expect_device(out_view, like, "out");
  expect(out_view.contiguous() && out_view.numel() == args.map.sizes[0] &&
             out_view.element == (args.map.f64 ? genkern::Element::f64 : genkern::Element::f32),
         "out: expected contiguous [B] of float32 (float64 for float64 states)");
  args.out = out_view.data;
  run_on(
      like, views.stream(), [&] { genkern::quantile_cpu(args, kThreads); },
      [&]([[maybe_unused]] void* cuda_stream) -> const char* {
#ifdef GENKERN_WITH_CUDA
        return with_workspace(genkern::quantile_workspace_cuda(args.map), cuda_stream, args.workspace,
                              [&] { return genkern::quantile_cuda(args, cuda_stream); });
#else
        return nullptr;
#endif
      });
}

std::string cpu_isa(const std::string& select) {
  expect(select.empty() || genkern::select_cpu_isa(select.c_str()), "select: this CPU has no ", select);
  return genkern::cpu_isa();
}

constexpr bool kHasCuda =
#ifdef GENKERN_WITH_CUDA
    true;
#else
    false;
#endif

}  // namespace

PYBIND11_MODULE(_arrays, module) {
  module.doc() = "genkern's kernels on NumPy arrays and on any array that speaks DLPack.";
  module.def("map", &map_out, py::arg("x"), py::arg("m"), py::arg("m_uncond"), py::arg("h"), py::arg("z"),
             py::arg("row"), py::arg("table"), py::arg("index"), py::arg("values"), py::arg("cells"), py::arg("scales"),
             py::arg("formula"), py::arg("noise"), py::arg("key"), py::arg("device_key"), py::arg("sample_ids"),
             py::arg("use_pred"), py::arg("out"), py::arg("stream") = py::none(),
             "torch.ops.genkern.map_out, over arrays, into given outputs.");
  module.def("reduce", &reduce_out, py::arg("x"), py::arg("m"), py::arg("m_uncond"), py::arg("h"), py::arg("z"),
             py::arg("row"), py::arg("table"), py::arg("index"), py::arg("values"), py::arg("cells"), py::arg("scales"),
             py::arg("formula"), py::arg("noise"), py::arg("key"), py::arg("device_key"), py::arg("sample_ids"),
             py::arg("use_pred"), py::arg("mask"), py::arg("kind"), py::arg("residual"), py::arg("sums"),
             py::arg("stream") = py::none(),
             "torch.ops.genkern.reduce, over arrays, into a given residual and sums [B, 2].");
  module.def("stat", &stat_out, py::arg("x"), py::arg("m"), py::arg("m_uncond"), py::arg("h"), py::arg("z"),
             py::arg("row"), py::arg("table"), py::arg("index"), py::arg("values"), py::arg("cells"), py::arg("scales"),
             py::arg("formula"), py::arg("noise"), py::arg("key"), py::arg("device_key"), py::arg("sample_ids"),
             py::arg("use_pred"), py::arg("outs"), py::arg("kind"), py::arg("atol"), py::arg("rtol"), py::arg("sums"),
             py::arg("stream") = py::none(), "torch.ops.genkern.stat, over arrays, into given sums.");
  module.def("stat_quantile", &quantile_out, py::arg("x"), py::arg("m"), py::arg("m_uncond"), py::arg("h"),
             py::arg("z"), py::arg("row"), py::arg("table"), py::arg("index"), py::arg("values"), py::arg("cells"),
             py::arg("scales"), py::arg("formula"), py::arg("noise"), py::arg("key"), py::arg("device_key"),
             py::arg("sample_ids"), py::arg("use_pred"), py::arg("q"), py::arg("out"), py::arg("stream") = py::none(),
             "torch.ops.genkern.stat_quantile, over arrays, into a given [B].");
  module.def("cpu_isa", &cpu_isa, py::arg("select") = "",
             "The CPU instruction set in use; a name selects one (for tests), and is an error where the CPU lacks it.");
  module.attr("has_cuda") = kHasCuda;
  genkern::add_eager(module.ptr());
}
