// A quantile of |out_0| on CUDA, by radix selection (stat.h): no sample is sorted or written anywhere.
//
// A sample of up to kOneBlock elements is one block's, which counts it once a digit: one launch. A longer one is
// counted by several blocks, into a tally a digit in global memory: a launch a digit and one more, whatever the numbers
// are.
#include "launch_cuda.cuh"
#include "stat.h"

namespace genkern {
namespace {

constexpr int64_t kOneBlock = 16384;
constexpr int kMostBlocks = 1024;  // a sample

using Count = unsigned long long;  // as atomics take it

// How many numbers of a sample have which digit, among those with the prefix of the digits before.
struct Tally {
  Count bins[kBins];
  Count nans;
  Count above;         // the complement of the least key of a higher prefix; 0: none
  Count prefix, rank;  // of the numbers that are counted, and which of them is wanted
};

struct Block {
  uint32_t bins[kBins];
  uint32_t nans;
  Count above;
  Count sums[kThreads];
  Count found_rank;
  int found_bin;
};

struct Found {
  int bin;  // kBins where there are not so many
  Count rank;
};

// The bin of the number of a rank, and its rank in the bin. Every thread of the block calls it.
template <typename Bins>
__device__ __forceinline__ Found find(const Bins* bins, Count rank, Block& block) {
  constexpr int kEach = kBins / kThreads;
  const int t = threadIdx.x;
  Count own = 0;
  for (int k = 0; k < kEach; ++k) own += bins[t * kEach + k];
  block.sums[t] = own;
  if (t == 0) block.found_bin = kBins;
  for (int step = 1; step < kThreads; step *= 2) {
    __syncthreads();
    const Count before = t >= step ? block.sums[t - step] : 0;
    __syncthreads();
    block.sums[t] += before;
  }
  const Count before = block.sums[t] - own;
  if (rank >= before && rank - before < own) {
    Count rest = rank - before;
    int k = t * kEach;
    for (; rest >= bins[k]; ++k) rest -= bins[k];
    block.found_bin = k;
    block.found_rank = rest;
  }
  __syncthreads();
  const Found found{block.found_bin, block.found_rank};
  __syncthreads();
  return found;
}

// The quantile, once the last digit is counted. Every thread of the block calls it.
template <typename Acc, typename Bins>
__device__ __forceinline__ Acc answer(const Bins* bins, Count above, Count prefix, Count rank, const Place& place,
                                      Block& block) {
  const Digit<Acc> last(Digit<Acc>::kCount - 1);
  const Found at = find(bins, rank, block), next = find(bins, rank + 1, block);
  const auto key = [&](int bin) { return prefix << last.width | static_cast<Count>(bin); };
  Acc low, high;
  value_of(key(at.bin), low);
  value_of(next.bin < kBins ? key(next.bin) : ~above, high);
  return interpolate(low, high, place.rest);
}

// Counts digits [digit, ...) of this block's part of a sample: one of them into tallies, or all where tallies is null.
template <typename V>
__global__ void __launch_bounds__(kThreads) count_kernel(const __grid_constant__ typename V::Pass pass, Place place,
                                                         int digit, Tally* tallies, typename V::Acc* out) {
  using Acc = typename V::Acc;
  __shared__ typename V::Shared shared;
  __shared__ Block block;
  const int64_t b = sample_of_thread();
  if (b >= pass.batch) return;  // of the whole block, as a block has one sample
  Tally* own = tallies == nullptr ? nullptr : tallies + b * Digit<Acc>::kCount;
  Count prefix = 0, rank = place.rank;
  if (digit > 0) {
    const Tally& before = own[digit - 1];
    const Found found = find(before.bins, before.rank, block);
    prefix = before.prefix << Digit<Acc>(digit - 1).width | static_cast<Count>(found.bin);
    rank = found.rank;
  }
  for (int d = digit;; ++d) {
    const Digit<Acc> now(d);
    for (int k = threadIdx.x; k < kBins; k += kThreads) block.bins[k] = 0;
    if (threadIdx.x == 0) block.nans = 0, block.above = 0;
    __syncthreads();
    Count above = 0;
    uint32_t nans = 0;
    walk<V>(pass, shared, [&](const V& vector, const auto& cells, auto draw) {
      Acc values[V::kOuts][V::kVec];
      vector.apply(pass, cells, draw, values);
#pragma unroll
      for (int e = 0; e < V::kVec; ++e) {
        if (e >= vector.count) break;
        const Acc v = values[0][e] < Acc(0) ? -values[0][e] : values[0][e] + Acc(0);  // -0 becomes 0
        if (v != v) {
          ++nans;
          continue;
        }
        const Count key = key_of(v), head = now.prefix(key);
        if (head == prefix) atomicAdd(&block.bins[now.bin(key)], 1u);
        if (head > prefix && ~key > above) above = ~key;
      }
    });
    if (nans != 0) atomicAdd(&block.nans, nans);
    if (above != 0 && d + 1 == Digit<Acc>::kCount) atomicMax(&block.above, above);
    __syncthreads();
    if (own != nullptr) {
      Tally& tally = own[d];
      for (int k = threadIdx.x; k < kBins; k += kThreads)
        if (block.bins[k] != 0) atomicAdd(&tally.bins[k], static_cast<Count>(block.bins[k]));
      if (threadIdx.x == 0) {
        if (block.nans != 0) atomicAdd(&tally.nans, static_cast<Count>(block.nans));
        if (block.above != 0) atomicMax(&tally.above, block.above);
        if (blockIdx.x == 0) tally.prefix = prefix, tally.rank = rank;
      }
      return;
    }
    if (d + 1 == Digit<Acc>::kCount) {
      const bool nan = block.nans != 0;
      const Acc found = answer<Acc>(block.bins, block.above, prefix, rank, place, block);
      if (threadIdx.x == 0) out[b] = nan ? static_cast<Acc>(NAN) : found;
      return;
    }
    const Found found = find(block.bins, rank, block);
    prefix = prefix << now.width | static_cast<Count>(found.bin);
    rank = found.rank;
  }
}

// The quantiles of samples that several blocks have counted, or that have no elements (tallies is null).
template <typename Acc>
__global__ void __launch_bounds__(kThreads) finish_kernel(const Tally* tallies, Place place, Acc* out) {
  __shared__ Block block;
  const int64_t b = blockIdx.x;
  if (tallies == nullptr) {
    if (threadIdx.x == 0) out[b] = static_cast<Acc>(NAN);
    return;
  }
  const Tally* own = tallies + b * Digit<Acc>::kCount;
  const Tally& last = own[Digit<Acc>::kCount - 1];
  const Acc found = answer<Acc>(last.bins, last.above, last.prefix, last.rank, place, block);
  if (threadIdx.x == 0) out[b] = own[0].nans != 0 ? static_cast<Acc>(NAN) : found;
}

template <typename Acc>
size_t tallies_bytes(const Walk& walk) {
  return walk.n <= kOneBlock ? 0 : static_cast<size_t>(walk.batch) * Digit<Acc>::kCount * sizeof(Tally);
}

struct QuantilePass {
  static constexpr uint32_t kReduced = 0;
  const QuantileArgs& args;
  const Walk& walk;
  cudaStream_t stream;

  template <typename V>
  void launch() const {
    using Acc = typename V::Acc;
    auto* out = static_cast<Acc*>(args.out);
    const Place place = place_of(args.q, walk.n);
    const dim3 samples(static_cast<unsigned>(walk.batch));
    if (walk.n == 0) {
      finish_kernel<Acc><<<samples, kThreads, 0, stream>>>(nullptr, place, out);
      return;
    }
    typename V::Pass pass{};
    lay<V>(args.map, walk, 1, pass);
    const int64_t chunks = (walk.n + kThreads * V::kVec - 1) / (kThreads * V::kVec);
    const int64_t wanted = std::min<int64_t>((walk.n + kOneBlock - 1) / kOneBlock, kMostBlocks);
    pass.chunks = static_cast<int32_t>((chunks + wanted - 1) / wanted);
    pass.blocks = (chunks + pass.chunks - 1) / pass.chunks;
    const Launch laid = grid_of(dim3(kThreads), pass.blocks, walk.batch);
    auto* tallies = walk.n <= kOneBlock ? nullptr : static_cast<Tally*>(args.workspace);
    if (tallies == nullptr) {
      count_kernel<V><<<laid.grid, laid.block, 0, stream>>>(pass, place, 0, tallies, out);
      return;
    }
    cudaMemsetAsync(tallies, 0, tallies_bytes<Acc>(walk), stream);
    for (int digit = 0; digit < Digit<Acc>::kCount; ++digit)
      count_kernel<V><<<laid.grid, laid.block, 0, stream>>>(pass, place, digit, tallies, out);
    finish_kernel<Acc><<<samples, kThreads, 0, stream>>>(tallies, place, out);
  }
};

}  // namespace

size_t quantile_workspace_cuda(const MapArgs& args) {
  const Walk walk = make_walk(args, /*keep_samples=*/true);
  return args.f64 ? tallies_bytes<double>(walk) : tallies_bytes<float>(walk);
}

const char* quantile_cuda(const QuantileArgs& args, void* stream) {
  const Walk walk = make_walk(args.map, /*keep_samples=*/true);
  if (walk.batch == 0) return nullptr;
  launch_undrawn(args.map, walk, QuantilePass{args, walk, static_cast<cudaStream_t>(stream)});
  return launch_error();
}

}  // namespace genkern
