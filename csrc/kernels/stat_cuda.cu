// stat on CUDA: the row's outputs of a thread's vectors, summed in a fixed tree.
//
// Two launches and no atomics, as of reduce. How a sample is laid over blocks depends on its size alone, so that the
// sums are the same in every batch.
#include "launch_cuda.cuh"
#include "stat.h"

namespace genkern {
namespace {

// The n sums over the threads of a sample's row of the block, in a fixed tree; blockDim.x is a power of two.
__device__ __forceinline__ void sum_along_x(double (*sums)[kThreads], int n) {
  const int at = threadIdx.y * blockDim.x + threadIdx.x;
  for (int width = blockDim.x / 2; width > 0; width /= 2) {
    __syncthreads();
    if (threadIdx.x < width)
      for (int k = 0; k < n; ++k) sums[k][at] += sums[k][at + width];
  }
}

template <typename V>
__global__ void __launch_bounds__(kThreads) stat_kernel(const __grid_constant__ typename V::Pass pass, Stat kind,
                                                        typename V::Acc atol, typename V::Acc rtol, double* partials) {
  using Acc = typename V::Acc;
  __shared__ typename V::Shared shared;
  __shared__ double sums[kMaxSums][kThreads];
  double firsts[kMaxOuts] = {}, products[kMaxOuts][kMaxOuts] = {};  // of the second those with i <= j
  walk<V>(pass, shared, [&](const V& vector, const auto& cells, auto draw) {
    Acc out[V::kOuts][V::kVec];
    vector.apply(pass, cells, draw, out);
#pragma unroll
    for (int e = 0; e < V::kVec; ++e) {
      if (e >= vector.count) break;
      if (kind == Stat::error) {
        const Acc first = pass.n_out > 1 ? out[1][e] : Acc(0), second = pass.n_out > 2 ? out[2][e] : Acc(0);
        const auto r = static_cast<double>(scaled_error(out[0][e], first, second, atol, rtol));
        firsts[0] += r * r;
        continue;
      }
#pragma unroll
      for (int i = 0; i < kMaxOuts; ++i) {
        if (i >= pass.n_out) break;
        const auto v = static_cast<double>(out[i][e]);
        firsts[i] += v;
#pragma unroll
        for (int j = i; j < kMaxOuts; ++j) {
          if (j >= pass.n_out) break;
          products[i][j] += v * static_cast<double>(out[j][e]);
        }
      }
    }
  });
  const int at = threadIdx.y * blockDim.x + threadIdx.x;
  int n = 0;
#pragma unroll
  for (int i = 0; i < kMaxOuts; ++i)
    if (i < pass.n_out && (i == 0 || kind == Stat::moments)) sums[n++][at] = firsts[i];
#pragma unroll
  for (int i = 0; i < kMaxOuts; ++i)
#pragma unroll
    for (int j = i; j < kMaxOuts; ++j)
      if (j < pass.n_out && kind == Stat::moments) sums[n++][at] = products[i][j];
  sum_along_x(sums, n);
  const int64_t b = sample_of_thread();
  if (threadIdx.x == 0 && b < pass.batch)
    for (int k = 0; k < n; ++k) partials[(b * pass.blocks + blockIdx.x) * n + k] = sums[k][at];
}

__global__ void __launch_bounds__(kThreads) add_kernel(const double* partials, int64_t blocks, int n, double* out) {
  __shared__ double sums[kMaxSums][kThreads];
  const int64_t b = blockIdx.x;
  for (int k = 0; k < n; ++k) {
    double sum = 0.0;
    for (int64_t block = threadIdx.x; block < blocks; block += kThreads) sum += partials[(b * blocks + block) * n + k];
    sums[k][threadIdx.x] = sum;
  }
  sum_along_x(sums, n);
  if (threadIdx.x == 0)
    for (int k = 0; k < n; ++k) out[b * n + k] = sums[k][0];
}

struct StatPass {
  static constexpr uint32_t kReduced = 0;
  const StatArgs& args;
  const Walk& walk;
  cudaStream_t stream;

  template <typename V>
  void launch() const {
    using Acc = typename V::Acc;
    typename V::Pass pass{};
    Launch laid = lay<V>(args.map, walk, /*most=*/1, pass);
    // Several chunks a block, for a tree of sums costs as much as some chunks; how many, n alone decides.
    pass.chunks = static_cast<int32_t>(std::min<int64_t>(std::max<int64_t>(pass.blocks / 32, 1), 16));
    pass.blocks = (pass.blocks + pass.chunks - 1) / pass.chunks;
    laid.grid.x = static_cast<unsigned>(pass.blocks);
    const auto atol = static_cast<Acc>(args.atol), rtol = static_cast<Acc>(args.rtol);
    auto* partials = static_cast<double*>(args.workspace);
    if (walk.n > 0) stat_kernel<V><<<laid.grid, laid.block, 0, stream>>>(pass, args.kind, atol, rtol, partials);
    const int n_sums = sums_of(args.kind, args.map.n_out);
    const dim3 samples(static_cast<unsigned>(walk.batch));
    add_kernel<<<samples, kThreads, 0, stream>>>(partials, walk.n > 0 ? pass.blocks : 0, n_sums, args.sums);
  }
};

}  // namespace

size_t stat_workspace_cuda(const MapArgs& args) {
  const Walk walk = make_walk(args, /*keep_samples=*/true);
  int64_t blocks = 0;
  int32_t chunks = 0;
  lay_chunks(walk.batch, walk.n, walk.linear ? vector_width(args) : 1, 1, 1, blocks, chunks);
  return static_cast<size_t>(walk.batch * blocks) * kMaxSums * sizeof(double);
}

const char* stat_cuda(const StatArgs& args, void* stream) {
  const Walk walk = make_walk(args.map, /*keep_samples=*/true);
  if (walk.batch == 0) return nullptr;
  launch_undrawn(args.map, walk, StatPass{args, walk, static_cast<cudaStream_t>(stream)});
  return launch_error();
}

}  // namespace genkern
