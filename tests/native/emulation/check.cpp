// Random passes through the CPU kernels and the emulated CUDA kernels: map and the residual of reduce agree bit for
// bit, sums and the total over the batch to 1e-5. Prints "passes N" when all do; says which pass differed and exits
// with 1 otherwise.
#include "passes.h"

namespace {

// Half of the passes write over an input, where one has the output's type and memory of its own for every element.
void choose_in_place(Pass& pass) {
  const MapArgs& args = pass.args;
  if (chance(0.5)) return;
  for (int k : {kX, kM, kH0, kV, kKnownData}) {
    if (args.in[k].data == nullptr || args.in[k].dtype != args.out[0].dtype) continue;
    bool apart = true;
    for (int d = 0; d < args.ndim; ++d) apart = apart && (args.sizes[d] == 1 || pass.buffers[k].strides[d] != 0);
    if (apart) {
      pass.in_place = k;
      return;
    }
  }
}

// NaN has many bit patterns, and which one an operation gives is not part of the contract.
bool same(const Buffer& a, const Buffer& b, DType dtype) {
  const size_t n = a.bytes.size() / size_of_dtype(dtype);
  for (size_t i = 0; i < n; ++i) {
    const size_t at = i * size_of_dtype(dtype);
    if (std::memcmp(&a.bytes[at], &b.bytes[at], size_of_dtype(dtype)) == 0) continue;
    return false;
  }
  return true;
}

int fail(int number, const MapArgs& args, const char* what) {
  std::printf(
      "pass %d differs: %s; ndim %d, outputs %d, f64 %d, noise %d, pred %d, formula %d, table %d, values %d, "
      "v %d, blended %u\n",
      number, what, args.ndim, args.n_out, args.f64, static_cast<int>(args.noise.draw_kind), args.use_pred,
      static_cast<int>(args.rows.formula), args.rows.table != nullptr, args.rows.n_values, args.in[kV].data != nullptr,
      args.blended);
  return 1;
}

int check(int number) {
  Pass pass;
  const bool reduce = chance(0.4);
  build(pass, reduce);
  choose_in_place(pass);
  pass.scale = chance(0.5) ? 1.0 : 0.37;
  pass.by_m = pass.args.in[kM].data != nullptr && chance(0.3);
  pass.unwritten = reduce && pass.in_place < 0 && chance(0.25);
  if (reduce && chance(0.4))
    for (int64_t b = 0; b < pass.args.sizes[0]; ++b) pass.weight.push_back(static_cast<float>(pick(0, 40)) / 8.0f);
  MapArgs& args = pass.args;
  constexpr double kGuard = -7.5;  // after the workspace
  bool overrun = false;
  auto run = [&](bool cuda, std::vector<double>& sums) -> std::vector<Buffer> {
    std::vector<Buffer> outs(pass.buffers.begin() + kInputs, pass.buffers.end());
    for (int j = 0; j < args.n_out; ++j) args.out[j] = outs[j].array(args.out[j].dtype);
    if (pass.in_place >= 0) {
      outs[0] = pass.buffers[pass.in_place];
      args.in[pass.in_place] = args.out[0] = outs[0].array(args.out[0].dtype);
    }
    if (!reduce) {
      cuda ? static_cast<void>(map_cuda(args, nullptr)) : map_cpu(args, kSerial);
    } else {
      ReduceArgs r;
      r.map = args;
      r.scale = pass.scale;
      r.by_m = pass.by_m;
      r.rho = number % 2 != 0 ? Rho::square : Rho::absolute;
      std::vector<double> raw(2 * args.sizes[0] + 2),
          workspace((cuda ? reduce_workspace_cuda(args) : reduce_workspace_cpu(args)) / 8 + 1, kGuard);
      double total = 0.0;
      r.total = &total, r.total_scale = 0.25, r.workspace = workspace.data();
      if (!pass.weight.empty()) r.weight = {pass.weight.data(), DType::f32, 1, 0, 1.0};
      if (number % 3 != 0) r.sums = raw.data();
      if (pass.unwritten) r.map.out[0].data = nullptr;
      cuda ? static_cast<void>(reduce_cuda(r, nullptr)) : reduce_cpu(r, kSerial);
      overrun = overrun || workspace.back() != kGuard;
      for (int64_t i = 0; i < 2 * args.sizes[0]; ++i)
        sums.push_back(args.f64 ? raw[i] : reinterpret_cast<const float*>(raw.data())[i]);
      sums.push_back(args.f64 ? total : reinterpret_cast<const float*>(&total)[0]);
    }
    return outs;
  };
  std::vector<double> cpu_sums, cuda_sums;
  const std::vector<Buffer> cuda = run(true, cuda_sums);
  for (const char* isa : {"scalar", "avx2", "avx512"}) {
    if (!select_cpu_isa(isa)) continue;
    std::vector<double> sums;
    const std::vector<Buffer> cpu = run(false, sums);
    for (int j = 0; j < args.n_out; ++j)
      if (!same(cpu[j], cuda[j], args.out[j].dtype)) return fail(number, args, isa);
    if (!cpu_sums.empty() && sums != cpu_sums) return fail(number, args, "sums between instruction sets");
    if (overrun) return fail(number, args, "workspace");
    cpu_sums = sums;
    for (size_t i = 0; i < sums.size(); ++i) {
      const double scale = std::fmax(1e-6, std::fabs(sums[i]));
      if (!(std::fabs(sums[i] - cuda_sums[i]) <= 1e-5 * scale)) return fail(number, args, "sums");
    }
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  const int count = argc > 1 ? std::atoi(argv[1]) : 500;
  for (int i = 0; i < count; ++i)
    if (check(i) != 0) return 1;
  std::printf("passes %d\n", count);
}
