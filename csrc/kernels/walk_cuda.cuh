// The walk of a block's threads over the vectors of a pass, and the noise of each.
#pragma once

#include "vector_cuda.cuh"

namespace genkern {
namespace {

// The noise of one sample: four numbers an index that 4 divides.
template <typename Facts, typename Acc>
struct Quads {
  PhiloxRounds keys;
  uint32_t draw, low, high;
  bool normal;

  __device__ __forceinline__ Quads(const Pass<Acc>& pass, int64_t b) {
    if constexpr (Facts::kDraw) {
      const NoiseSource& source = pass.noise;
      keys = pass.keys;
      draw = source.draw;
      if (source.device_key != nullptr) {
        // Said to be one number a warp, keys stay in uniform registers, of which there are enough: with 20 of each
        // thread's a multiprocessor holds four blocks instead of five.
        const int64_t* const key = source.device_key;
        const PhiloxKey own = philox_key(static_cast<uint64_t>(key[0]), static_cast<uint64_t>(key[1]));
        keys = philox_rounds({__shfl_sync(kWholeWarp, own.k0, 0), __shfl_sync(kWholeWarp, own.k1, 0)});
        draw += static_cast<uint32_t>(key[2]);
      }
      const int64_t id = source.sample_ids != nullptr && b < pass.batch ? source.sample_ids[b] : b;
      low = static_cast<uint32_t>(id), high = static_cast<uint32_t>(static_cast<uint64_t>(id) >> 32);
      normal = Facts::kWhole || source.draw_kind == Draw::normal;
    }
  }

  // The numbers of indices 4 quad to 4 quad + 3; a sample has at most 2^34 elements.
  __device__ __forceinline__ Floats4 operator()(uint32_t quad) const {
    const Words4 words = philox4x32_10(quad, draw, low, high, keys);
    return normal ? normal4(words) : uniform4(words);
  }
};

// The C-order index of element e of the dimensions first .. last of a walk; the slowest takes what is left without a
// division, of which one takes as long as half a Philox call.
template <typename Integer, typename Acc>
__device__ __forceinline__ int64_t index_of(const StridedPass<Acc>& pass, Integer e, int first, int last) {
  int64_t index = 0;
  for (int d = last; d >= first; --d) {
    const auto size = static_cast<Integer>(pass.sizes[d]);
    const Integer rest = d > first ? e / size : 0;
    index += static_cast<int64_t>(e - rest * size) * pass.strides[kIndex][d];
    e = rest;
  }
  return index;
}

// linear, strided: a thread's part of the block's chunks, kUnroll vectors of each.
template <typename V, typename Consume>
__device__ __forceinline__ void walk_chunks(const typename V::Pass& pass, typename V::Shared& shared, Consume consume) {
  using Acc = typename V::Acc;
  constexpr int kUnroll = V::Facts::kUnroll;
  const int64_t b = sample_of_thread();
  bool scales = false;
  if constexpr (V::Facts::kScales) {
    scales = pass.by_sample && pass.data[kX] == pass.data[kInputs] && pass.dtype[kX] == pass.dtype[kInputs];
    if (scales) {
      share(pass, b, shared);
      if (b >= pass.batch || Cells<Acc, typename V::Facts>(pass, shared, b)[kFirstOut + kOutX] == Acc(1)) return;
    }
  }
  V vectors[kUnroll];
  const int64_t apart = static_cast<int64_t>(blockDim.x) * V::kVec;
  int64_t first = static_cast<int64_t>(blockIdx.x) * pass.chunks * kUnroll * apart + threadIdx.x * V::kVec;
  const auto fetch = [&] {
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) vectors[i].fetch(pass, b, first + i * apart, pass.n);
  };
  fetch();
  if (!scales) share(pass, b, shared);
  const Cells<Acc, typename V::Facts> cells(pass, shared, b);
  const Quads<typename V::Facts, Acc> quads(pass, b);
  for (int done = 1;; ++done) {
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      const V& vector = vectors[k];
      if (vector.count == 0) continue;
      consume(vector, cells, [&](Acc* values) {
        if constexpr (V::kLayout == Layout::strided) {
          const int64_t index = index_of(pass, vector.e, 0, pass.ndim - 1);
          const Floats4 four = quads(static_cast<uint32_t>(index / 4));
          const int lane = static_cast<int>(index & 3);
          values[0] = lane == 0 ? four.v[0] : lane == 1 ? four.v[1] : lane == 2 ? four.v[2] : four.v[3];
        } else {
#pragma unroll
          for (int q = 0; q < V::kVec / 4; ++q) {
            const Floats4 four = quads(static_cast<uint32_t>(static_cast<uint64_t>(vector.e) >> 2) + q);
#pragma unroll
            for (int i = 0; i < 4; ++i) values[4 * q + i] = four.v[i];
          }
        }
      });
    }
    if (done >= pass.chunks) return;
    first += kUnroll * apart;
    fetch();
  }
}

// Where the number of a tile lies that is `byte` bytes from its first: groups of four swap places within eight, so that
// numbers 4 or 16 apart, as channels_last images of 4 channels have them, are in different banks. Four in a row stay
// so.
__device__ __forceinline__ char* in_banks(float* tile, uint32_t byte) {
  return reinterpret_cast<char*>(tile) + (byte ^ (byte >> 3 & 112));
}

// permuted: along the dimension of index stride 1 (`quad`), a quad's numbers are a whole run of the faster dimensions
// apart. A block draws the numbers of a tile, `pixels` along that dimension by all the faster ones, into shared memory
// in the order of memory, and then walks the tile, which memory holds in one piece; and so on with the tiles after it.
template <typename V, typename Consume>
__device__ __forceinline__ void walk_tiles(const typename V::Pass& pass, typename V::Shared& shared, Consume consume) {
  using Acc = typename V::Acc;
  constexpr int kVectors = kTile / kThreads / V::kVec, kQuads = kTile / kThreads / 4;
  __shared__ __align__(16) float tile[kTile];
  const int64_t b = group_of_block();  // of one sample
  const int64_t along = pass.sizes[pass.quad];
  const uint32_t run = static_cast<uint32_t>(pass.run), run_bytes = 4 * run;
  const auto most = static_cast<uint32_t>(pass.chunks), number = blockIdx.x * most;
  uint32_t left = pass.tiles - number < most ? pass.tiles - number : most;
  uint32_t outer = number / pass.tiles_along;
  int64_t pixel = static_cast<int64_t>(number - outer * pass.tiles_along) * pass.pixels;
  int64_t begin = (outer * along + pixel) * run, row = index_of(pass, outer, 0, pass.quad - 1);
  uint32_t size = 0;
  const auto offset = [](uint32_t k) { return (k * kThreads + threadIdx.x) * V::kVec; };
  // Whole vectors' loads are in flight while the noise is drawn.
  V vectors[V::Facts::kWhole ? kVectors : 1];
  const auto fetch = [&] {
    size = static_cast<uint32_t>(along - pixel < pass.pixels ? along - pixel : pass.pixels) * run;
    if constexpr (V::Facts::kWhole) {
#pragma unroll
      for (int k = 0; k < kVectors; ++k) vectors[k].fetch(pass, b, begin + offset(k), begin + size);
    }
  };
  fetch();
  share(pass, b, shared);
  const Cells<Acc, typename V::Facts> cells(pass, shared, b);
  const Quads<typename V::Facts, Acc> quads(pass, b);
  // Where this thread's quads go in a tile, in bytes, and which they are, from the tile's first on. Beside the quad's
  // own, strides of the index are multiples of 4.
  uint32_t to[kQuads], from[kQuads];
  const bool one_faster = pass.quad + 2 == pass.ndim;
  const auto stride = static_cast<uint32_t>(pass.strides[kIndex][pass.ndim - 1] / 4);
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    const uint32_t j = q * kThreads + threadIdx.x, four = j / run, c = j - four * run;
    to[q] = 4 * (4 * four * run + c);
    from[q] =
        four + (one_faster ? c * stride : static_cast<uint32_t>(index_of(pass, c, pass.quad + 1, pass.ndim - 1) / 4));
  }
  for (;;) {
    const auto first = static_cast<uint32_t>(static_cast<uint64_t>(row + pixel) >> 2);
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      if (q * kThreads + threadIdx.x >= size / 4) break;
      const Floats4 z = quads(first + from[q]);
#pragma unroll
      for (int i = 0; i < 4; ++i) *reinterpret_cast<float*>(in_banks(tile, to[q] + i * run_bytes)) = z.v[i];
    }
    __syncthreads();
#pragma unroll(V::Facts::kWhole ? kVectors : 1)
    for (int k = 0; k < kVectors; ++k) {
      V& vector = vectors[V::Facts::kWhole ? k : 0];
      if constexpr (!V::Facts::kWhole) vector.fetch(pass, b, begin + offset(k), begin + size);
      if (vector.count == 0) continue;
      consume(vector, cells, [&](Acc* values) {
#pragma unroll
        for (int i = 0; i < V::kVec; i += 4) {
          const float4 z = *reinterpret_cast<const float4*>(in_banks(tile, 4 * (offset(k) + i)));
          values[i] = z.x, values[i + 1] = z.y, values[i + 2] = z.z, values[i + 3] = z.w;
        }
      });
    }
    if (--left == 0) return;
    __syncthreads();  // before the tile is written again
    begin += size;
    pixel += pass.pixels;
    if (pixel >= along) pixel = 0, row = index_of(pass, ++outer, 0, pass.quad - 1);
    fetch();
  }
}

// consume(vector, cells, draw) takes each of this thread's vectors that holds elements.
template <typename V, typename Consume>
__device__ __forceinline__ void walk(const typename V::Pass& pass, typename V::Shared& shared, Consume consume) {
  if constexpr (V::kLayout == Layout::permuted) {
    walk_tiles<V>(pass, shared, consume);
  } else {
    walk_chunks<V>(pass, shared, consume);
  }
}

}  // namespace
}  // namespace genkern
