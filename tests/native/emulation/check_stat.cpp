// Random passes through stat on the CPU and through its emulated CUDA kernels: quantiles agree bit for bit, sums
// between instruction sets too, and with CUDA to 1e-13 of what they add up. Prints "passes N" when all do; says which
// pass differed and exits with 1 otherwise.
#include "passes.h"
#include "stat.h"

namespace {

constexpr double kGuard = -7.5;  // after the workspace

int fail(int number, const MapArgs& args, const char* what) {
  std::printf("pass %d differs: %s; ndim %d, outputs %d, f64 %d, pred %d, table %d, values %d\n", number, what,
              args.ndim, args.n_out, args.f64, args.use_pred, args.rows.table != nullptr, args.rows.n_values);
  return 1;
}

std::vector<double> workspace_of(size_t bytes) { return std::vector<double>(bytes / 8 + 1, kGuard); }

// The sums of moments of sample b: what their terms add up to in absolute value, at most.
double bound_of(const double* sums, int n_out, int64_t n, int k) {
  const auto square = [&](int j) {
    int at = n_out;
    for (int i = 0; i < j; ++i) at += n_out - i;
    return std::fabs(sums[at]);
  };
  if (k < n_out) return std::sqrt(static_cast<double>(n) * square(k));
  int at = n_out;
  for (int i = 0; i < n_out; ++i)
    for (int j = i; j < n_out; ++j)
      if (at++ == k) return std::sqrt(square(i) * square(j));
  return 0.0;
}

int check(int number) {
  Pass pass;
  build(pass, false, chance(0.12));
  MapArgs& args = pass.args;
  args.noise = {};
  if (args.in[kX].data == nullptr && args.in[kM].data == nullptr && args.in[kZ].data == nullptr) return 0;
  for (int j = 0; j < args.n_out; ++j) args.out[j].data = nullptr;
  int64_t n = 1;
  for (int d = 1; d < args.ndim; ++d) n *= args.sizes[d];
  const auto batch = static_cast<size_t>(args.sizes[0]);

  StatArgs stat;
  stat.map = args;
  stat.kind = chance(0.6) ? Stat::moments : Stat::error;
  stat.atol = 0.3, stat.rtol = 0.2;
  const int n_sums = sums_of(stat.kind, args.n_out);
  const auto sums_from = [&](bool cuda, bool& whole) {
    std::vector<double> sums(batch * n_sums + 1, kGuard);
    auto workspace = workspace_of(cuda ? stat_workspace_cuda(args) : stat_workspace_cpu(args));
    stat.sums = sums.data(), stat.workspace = workspace.data();
    cuda ? static_cast<void>(stat_cuda(stat, nullptr)) : stat_cpu(stat, kSerial);
    whole = whole && workspace.back() == kGuard && sums.back() == kGuard;
    return sums;
  };

  QuantileArgs quantile;
  quantile.map = args;
  quantile.map.n_out = 1;
  quantile.map.rows.n_cells = kFirstOut + kOutCells;
  if (args.rows.table == nullptr) {
    // Values of cells that a row with one output has not.
    RowSource& rows = quantile.map.rows;
    for (int k = 0; k < rows.n_values; ++k)
      if (rows.values[k].cell >= rows.n_cells && rows.values[k].cell < kMaxCells) rows.values[k].cell = kFirstOut;
  }
  const double qs[] = {0.0, 1.0, 0.5, 0.995, static_cast<double>(rng() >> 11) * 0x1p-53};
  quantile.q = qs[pick(0, 4)];
  const auto quantiles_from = [&](bool cuda, bool& whole) {
    std::vector<double> out(batch + 1, kGuard);
    auto workspace = workspace_of(cuda ? quantile_workspace_cuda(quantile.map) : quantile_workspace_cpu(quantile.map));
    quantile.out = out.data(), quantile.workspace = workspace.data();
    cuda ? static_cast<void>(quantile_cuda(quantile, nullptr)) : quantile_cpu(quantile, kSerial);
    whole = whole && workspace.back() == kGuard && out.back() == kGuard;
    return out;
  };

  bool whole = true;
  const auto cuda_sums = sums_from(true, whole);
  const bool few = batch <= 8;  // a block a sample, whose threads meet at many barriers: slow here
  const auto cuda_quantiles = few ? quantiles_from(true, whole) : std::vector<double>();
  std::vector<double> cpu_sums;
  for (const char* isa : {"scalar", "avx2", "avx512"}) {
    if (!select_cpu_isa(isa)) continue;
    const auto sums = sums_from(false, whole), quantiles = quantiles_from(false, whole);
    if (!cpu_sums.empty() && sums != cpu_sums) return fail(number, args, "sums between instruction sets");
    cpu_sums = sums;
    const size_t bytes = batch * (args.f64 ? 8 : 4);
    for (size_t b = 0; n == 0 && b < batch; ++b) {  // NaN, of any bits
      const double of = args.f64 ? quantiles[b] : reinterpret_cast<const float*>(quantiles.data())[b];
      if (of == of) return fail(number, args, "quantile of nothing");
    }
    if (few && n != 0 && std::memcmp(quantiles.data(), cuda_quantiles.data(), bytes) != 0)
      return fail(number, args, "quantile");
    for (size_t k = 0; k < batch * n_sums; ++k) {
      const double* of = &sums[k / n_sums * n_sums];
      const double most = stat.kind == Stat::error ? of[0] : bound_of(of, args.n_out, n, static_cast<int>(k % n_sums));
      if (!(std::fabs(sums[k] - cuda_sums[k]) <= 1e-13 * most)) return fail(number, args, "sums");
    }
  }
  return whole ? 0 : fail(number, args, "memory");
}

}  // namespace

int main(int argc, char** argv) {
  const int count = argc > 1 ? std::atoi(argv[1]) : 500;
  for (int i = 0; i < count; ++i)
    if (check(i) != 0) return 1;
  std::printf("passes %d\n", count);
}
