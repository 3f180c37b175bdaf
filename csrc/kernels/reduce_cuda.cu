// reduce on CUDA: r = row(x, m, ...); mask * r (mask * sign(r)) is written; sums of mask * rho(r) and of the mask, a
// sample.
//
// Two launches and no atomics: each block sums its tile in a fixed tree, then one block a sample sums the tiles. The
// same bits each run.
#include "pass_cuda.cuh"

namespace genkern {
namespace {

// The sum over the threads of a sample's row of the block, in a fixed tree; blockDim.x is a power of two.
template <typename Acc>
__device__ __forceinline__ void sum_along_x(Acc (*sums)[2]) {
  const int at = threadIdx.y * blockDim.x + threadIdx.x;
  for (int width = blockDim.x / 2; width > 0; width /= 2) {
    __syncthreads();
    if (threadIdx.x < width) {
      sums[at][0] += sums[at + width][0];
      sums[at][1] += sums[at + width][1];
    }
  }
}

template <typename Acc, int kVec, bool kLinear, bool kDraw>
__global__ void __launch_bounds__(kThreads)
    reduce_kernel(const __grid_constant__ Pass<Acc> pass, Rho rho, double* partials) {
  using V = Vector<Acc, kVec, kLinear, true, kDraw>;
  __shared__ Acc rows[kMaxRows][kMaxCells];
  __shared__ Acc sums[kThreads][2];
  const int64_t b = sample_of_thread();
  const bool masked = has(pass, kMask);
  V vector;
  vector.fetch(pass, b, element_of_thread<kVec>(pass, b), masked);
  const Acc* cells = block_row(pass, rows, b);
  Acc sum = 0, elements = 0;
  if (vector.count > 0) {
    Acc r[V::kOuts][kVec], mask[kVec];
    vector.apply(pass, cells, r);
    if (masked) decode<Acc, kVec>(vector.mask, pass.dtype[kMask], mask);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      if (i >= vector.count) break;
      const Acc weight = masked ? mask[i] : Acc(1);
      Acc v = weight != Acc(0) ? r[0][i] : Acc(0);
      elements += weight;
      if (rho == Rho::square) {
        sum += weight * v * v;
      } else {
        sum += weight * (v < Acc(0) ? -v : v);
        v = v > Acc(0) ? Acc(1) : (v < Acc(0) ? Acc(-1) : v);
      }
      r[0][i] = weight * v;
    }
    vector.put(pass, 0, r[0]);
  }
  const int at = threadIdx.y * blockDim.x + threadIdx.x;
  sums[at][0] = sum;
  sums[at][1] = elements;
  sum_along_x(sums);
  if (threadIdx.x == 0 && b < pass.batch) {
    double* partial = partials + 2 * (b * pass.tiles + blockIdx.x);
    partial[0] = static_cast<double>(sums[at][0]);
    partial[1] = static_cast<double>(sums[at][1]);
  }
}

template <typename Acc>
__global__ void __launch_bounds__(kThreads) finish_kernel(const double* partials, int64_t tiles, Acc* out) {
  __shared__ double sums[kThreads][2];
  const int64_t b = blockIdx.x;
  double sum = 0.0, elements = 0.0;
  for (int64_t t = threadIdx.x; t < tiles; t += kThreads) {
    sum += partials[2 * (b * tiles + t)];
    elements += partials[2 * (b * tiles + t) + 1];
  }
  sums[threadIdx.x][0] = sum;
  sums[threadIdx.x][1] = elements;
  sum_along_x(sums);
  if (threadIdx.x < 2) {
    __syncwarp(3u);
    out[2 * b + threadIdx.x] = static_cast<Acc>(sums[0][threadIdx.x]);
  }
}

template <typename Acc, int kVec, bool kLinear>
void launch(const ReduceArgs& args, const Walk& walk, cudaStream_t stream) {
  Pass<Acc> pass{};
  const Launch plan_ = plan(args.map, walk, kVec, pass);
  auto* partials = static_cast<double*>(args.workspace);
  if (walk.n > 0) {
    if (args.map.noise.draw_kind != Draw::none)
      reduce_kernel<Acc, kVec, kLinear, true><<<plan_.grid, plan_.block, 0, stream>>>(pass, args.rho, partials);
    else
      reduce_kernel<Acc, kVec, kLinear, false><<<plan_.grid, plan_.block, 0, stream>>>(pass, args.rho, partials);
  }
  finish_kernel<Acc><<<static_cast<unsigned>(walk.batch), kThreads, 0, stream>>>(partials, walk.n > 0 ? pass.tiles : 0,
                                                                                 static_cast<Acc*>(args.sums));
}

}  // namespace

size_t reduce_workspace_cuda(const MapArgs& args) {
  const Walk walk = make_walk(args, /*keep_samples=*/true);
  Pass<float> pass{};
  plan(args, walk, vector_width(args, walk), pass);
  return static_cast<size_t>(walk.batch * pass.tiles) * 2 * sizeof(double);
}

const char* reduce_cuda(const ReduceArgs& args, void* stream_) {
  const Walk walk = make_walk(args.map, /*keep_samples=*/true);
  if (walk.batch == 0) return nullptr;
  const auto stream = static_cast<cudaStream_t>(stream_);
  const int vec = vector_width(args.map, walk);
  if (vec == 1) {
    args.map.f64 ? launch<double, 1, false>(args, walk, stream) : launch<float, 1, false>(args, walk, stream);
  } else if (args.map.f64) {
    launch<double, 4, true>(args, walk, stream);
  } else {
    vec == 8 ? launch<float, 8, true>(args, walk, stream) : launch<float, 4, true>(args, walk, stream);
  }
  return launch_error();
}

}  // namespace genkern
