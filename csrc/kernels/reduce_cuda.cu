// reduce on CUDA: r = row(x, m, ...); scale * weight[b] * mask * r (with sign(r) for absolute values), times m's
// coefficient where asked for, is written; sums of mask * rho(r) and of the mask, a sample; and the weighted sum over
// the batch.
//
// No atomics: each block sums its chunks in a fixed tree; then a block sums the blocks of some samples, or, over the
// batch, one block all of them, or as many as are worth it and then one. The same bits each run.
#include "launch_cuda.cuh"

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

template <typename V>
__global__ void __launch_bounds__(kThreads, V::kBlocks)
    reduce_kernel(const __grid_constant__ typename V::Pass pass, Rho rho, double scale_of_all, Value weight, bool by_m,
                  double* partials) {
  using Acc = typename V::Acc;
  constexpr int kVec = V::kVec;
  __shared__ typename V::Shared shared;
  __shared__ Acc sums[kThreads][2];
  Acc sum = 0, elements = 0;
  const int64_t b = sample_of_thread();
  const bool written = pass.data[kInputs] != nullptr;
  const auto scale_of_sample = static_cast<Acc>(b < pass.batch ? scale_of_all * weight_of(weight, b) : 0.0);
  walk<V>(pass, shared, [&](const V& vector, const auto& cells, auto draw) {
    const Acc scale = by_m ? scale_of_sample * cells[kFirstOut + kOutM] : scale_of_sample;
    const bool masked = V::Facts::has(pass, kMask);
    Acc r[V::kOuts][kVec], mask[kVec];
    vector.apply(pass, cells, draw, r);
    if (masked) decode<Acc, kVec>(vector.mask, V::Facts::dtype(pass, kMask), mask);
    // In whole vectors no branch an element.
    const int count = V::Facts::kWhole ? kVec : vector.count;
    const auto weigh = [&](auto rho_of) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        if (i >= count) break;
        const Acc weight = masked ? mask[i] : Acc(1);
        const Acc v = weight != Acc(0) ? r[0][i] : Acc(0);
        if (masked) elements += weight;
        r[0][i] = scale * (weight * rho_of(weight, v));
      }
    };
    if (rho == Rho::square) {
      weigh([&](Acc weight, Acc v) {
        sum = fma_(weight * v, v, sum);
        return v;
      });
    } else {
      weigh([&](Acc weight, Acc v) {
        sum += weight * (v < Acc(0) ? -v : v);
        return v > Acc(0) ? Acc(1) : (v < Acc(0) ? Acc(-1) : v);
      });
    }
    if (!masked) elements += static_cast<Acc>(count);
    if (written) vector.put(pass, 0, r[0]);
  });
  const int at = threadIdx.y * blockDim.x + threadIdx.x;
  sums[at][0] = sum;
  sums[at][1] = elements;
  sum_along_x(sums);
  if (threadIdx.x == 0 && b < pass.batch) {
    double* partial = partials + 2 * (b * pass.blocks + blockIdx.x);
    partial[0] = static_cast<double>(sums[at][0]);
    partial[1] = static_cast<double>(sums[at][1]);
  }
}

// Adds up what a sample's blocks have found: blockDim.x threads a sample, blockDim.y samples.
template <typename Acc>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(const double* partials, int64_t blocks, int64_t batch, Acc* out) {
  __shared__ double sums[kThreads][2];
  const int64_t b = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  double sum = 0.0, elements = 0.0;
  for (int64_t k = threadIdx.x; b < batch && k < blocks; k += blockDim.x) {
    sum += partials[2 * (b * blocks + k)];
    elements += partials[2 * (b * blocks + k) + 1];
  }
  const int at = threadIdx.y * blockDim.x + threadIdx.x;
  sums[at][0] = sum;
  sums[at][1] = elements;
  sum_along_x(sums);
  if (threadIdx.x != 0 || b >= batch) return;
  out[2 * b] = static_cast<Acc>(sums[at][0]);
  out[2 * b + 1] = static_cast<Acc>(sums[at][1]);
}

// scale times the sum of weight[k / each] * in[k * step] over the k of this block, of count.
template <typename Out>
__global__ void __launch_bounds__(kThreads)
    total_kernel(const double* in, int64_t count, int64_t step, int64_t each, Value weight, double scale, Out* out) {
  __shared__ double sums[kThreads][2];
  const int64_t of_block = (count + gridDim.x - 1) / gridDim.x, first = blockIdx.x * of_block;
  double sum = 0.0;
  for (int64_t k = first + threadIdx.x; k < count && k < first + of_block; k += kThreads)
    sum += (weight.data != nullptr ? read_value(weight, k / each) : 1.0) * in[k * step];
  sums[threadIdx.x][0] = sum;
  sums[threadIdx.x][1] = 0.0;
  sum_along_x(sums);
  if (threadIdx.x == 0) out[blockIdx.x] = static_cast<Out>(scale * sums[0][0]);
}

// Numbers of the batch that one block adds. Of more of them a block adds a part each, and one of them the parts.
constexpr int64_t kOneBlock = 16 * kThreads, kPart = 4 * kThreads;
constexpr int64_t kTotalBlocks = 256;

struct Reduce {
  static constexpr uint32_t kReduced = kResidual;
  const ReduceArgs& args;
  const Walk& walk;
  cudaStream_t stream;

  template <typename V>
  void launch() const {
    using Acc = typename V::Acc;
    typename V::Pass pass{};
    // One block adds up what a sample's blocks have found: not too many of them.
    const int64_t long_sample = walk.n / (1024 * kThreads * V::kVec);
    const int most = std::max(most_chunks(args.map, V::kVec, /*reduces=*/true), static_cast<int>(long_sample));
    const Launch laid = lay<V>(args.map, walk, most, pass);
    auto* partials = static_cast<double*>(args.workspace);
    const int64_t blocks = walk.n > 0 ? pass.blocks : 0;
    if (walk.n > 0)
      reduce_kernel<V>
          <<<laid.grid, laid.block, 0, stream>>>(pass, args.rho, args.scale, args.weight, args.by_m, partials);
    auto* const sums = static_cast<Acc*>(args.sums);
    const auto batch = static_cast<unsigned>(walk.batch);
    if (sums != nullptr) {
      int along = 1;
      while (along < kThreads && along < blocks) along *= 2;
      const unsigned samples = kThreads / along, groups = (batch + samples - 1) / samples;
      finish_kernel<Acc><<<groups, dim3(along, samples), 0, stream>>>(partials, blocks, walk.batch, sums);
    }
    if (args.total != nullptr)
      add_up(partials, walk.batch * blocks, std::max<int64_t>(blocks, 1), static_cast<Acc*>(args.total));
  }

  template <typename Acc>
  void add_up(double* partials, int64_t count, int64_t each, Acc* total) const {
    const double scale = args.total_scale;
    const Value weight = args.weight;
    if (count <= kOneBlock) {
      total_kernel<Acc><<<1, kThreads, 0, stream>>>(partials, count, 2, each, weight, scale, total);
      return;
    }
    const auto blocks = static_cast<unsigned>(std::min((count + kPart - 1) / kPart, kTotalBlocks));
    double* const sums = partials + 2 * count;
    total_kernel<double><<<blocks, kThreads, 0, stream>>>(partials, count, 2, each, weight, 1.0, sums);
    total_kernel<Acc><<<1, kThreads, 0, stream>>>(sums, blocks, 1, 1, Value{}, scale, total);
  }
};

}  // namespace

size_t reduce_workspace_cuda(const MapArgs& args) {
  const Walk walk = make_walk(args, /*keep_samples=*/true);
  // Of the kernels that may take the pass, the one with the most blocks: a vector a thread, a chunk or a tile a block.
  int64_t blocks = 0;
  int32_t chunks = 0;
  lay_chunks(walk.batch, walk.n, walk.linear ? vector_width(args) : 1, 1, 1, blocks, chunks);
  Tiles tiles;
  if (tiles.of(walk, vector_width(args))) blocks = std::max(blocks, tiles.of_sample);
  return (static_cast<size_t>(walk.batch * blocks) * 2 + kTotalBlocks) * sizeof(double);
}

const char* reduce_cuda(const ReduceArgs& args, void* stream) {
  const Walk walk = make_walk(args.map, /*keep_samples=*/true);
  const Reduce reduce{args, walk, static_cast<cudaStream_t>(stream)};
  if (walk.batch == 0) {
    if (args.total == nullptr) return nullptr;
    args.map.f64 ? reduce.add_up(nullptr, 0, 1, static_cast<double*>(args.total))
                 : reduce.add_up(nullptr, 0, 1, static_cast<float*>(args.total));
    return launch_error();
  }
  const bool draw = args.map.noise.draw_kind != Draw::none;
  const auto typed = [&](Types types) {
    draw ? launch_typed<kMaxH, 1, true>(types, reduce) : launch_typed<kMaxH, 1, false>(types, reduce);
  };
  if (walk.n > 0 && launch_fixed<kReduceTerms, kReducePermutedTerms>(args.map, walk, reduce, typed))
    return launch_error();
  launch_any(args.map, walk, [&](auto acc, auto vec, auto layout) {
    using Acc = decltype(acc);
    constexpr int kVec = decltype(vec)::value;
    constexpr Layout kLayout = decltype(layout)::value;
    if constexpr (kLayout == Layout::permuted) {
      reduce.launch<Vector<Acc, kVec, kLayout, Any<kMaxH, 1, true>>>();
    } else {
      draw ? reduce.launch<Vector<Acc, kVec, kLayout, Any<kMaxH, 1, true>>>()
           : reduce.launch<Vector<Acc, kVec, kLayout, Any<kMaxH, 1, false>>>();
    }
  });
  return launch_error();
}

}  // namespace genkern
