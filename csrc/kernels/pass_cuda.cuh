// What the CUDA kernels share: the arguments of a pass on the device, how a block maps to samples, and how a thread
// brings in its elements and applies the row.
//
// A block is tx threads along a sample by ty samples; a thread takes vectors of kVec elements. Terms are fetched as raw
// bytes first, all of them, and converted after, so that several independent loads are in flight: whether a term is
// given and what its type is are uniform branches, a few instructions among the hundreds that bandwidth leaves room
// for.
#pragma once

#include <cuda_runtime.h>

#include "half.h"
#include "layout.h"
#include "philox.h"
#include "rows.h"

namespace genkern {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxRows = 64;  // samples a block
constexpr int kArrays = kInputs + kMaxOuts;

template <typename Acc>
struct Pass {
  void* data[kArrays];
  int64_t batch_stride[kArrays];
  DType dtype[kArrays];
  uint32_t given, aligned;  // bits, by array
  int64_t batch, n, tiles;
  int32_t n_out;
  bool use_pred, by_sample;
  Acc cells[kMaxCells];  // the row of every sample, unless by_sample
  NoiseSource noise;
  RowSource rows;
  // A walk that is not linear:
  int32_t ndim;
  int64_t sizes[kMaxDims];
  int64_t strides[kWalkArrays][kMaxDims];
};

__host__ __device__ constexpr int size_of(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : dtype == DType::u8 ? 1 : 2;
}

// kVec elements as they lie in memory.
template <int kWords>
struct Raw {
  uint32_t w[kWords];
};

template <int kVec, int kWords>
__device__ __forceinline__ void load_bytes(const char* from, int size, bool vector, int count, Raw<kWords>& raw) {
  if (vector) {
    switch (size * kVec) {
      case 4: raw.w[0] = *reinterpret_cast<const uint32_t*>(from); return;
      case 8: {
        const uint2 v = *reinterpret_cast<const uint2*>(from);
        raw.w[0] = v.x, raw.w[1] = v.y;
        return;
      }
      default:
#pragma unroll
        for (int i = 0; i < kWords / 4; ++i) {
          if (16 * i < size * kVec) {
            const uint4 v = *reinterpret_cast<const uint4*>(from + 16 * i);
            raw.w[4 * i] = v.x, raw.w[4 * i + 1] = v.y, raw.w[4 * i + 2] = v.z, raw.w[4 * i + 3] = v.w;
          }
        }
        return;
    }
  }
#pragma unroll
  for (int i = 0; i < kWords; ++i) raw.w[i] = 0;
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    if (i >= count) break;
    if (size == 1) {
      raw.w[i / 4] |= static_cast<uint32_t>(*reinterpret_cast<const uint8_t*>(from + i)) << (8 * (i % 4));
    } else if (size == 2) {
      raw.w[i / 2] |= static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(from + 2 * i)) << (16 * (i % 2));
    } else if (size == 4) {
      if (i < kWords) raw.w[i] = *reinterpret_cast<const uint32_t*>(from + 4 * i);
    } else if (2 * i + 1 < kWords) {
      const uint2 v = *reinterpret_cast<const uint2*>(from + 8 * i);
      raw.w[2 * i] = v.x, raw.w[2 * i + 1] = v.y;
    }
  }
}

template <typename Acc, int kVec, int kWords>
__device__ __forceinline__ void decode(const Raw<kWords>& raw, DType dtype, Acc* values) {
  const auto half = [&](int i) { return static_cast<uint16_t>(raw.w[i / 2] >> (16 * (i % 2))); };
  if (dtype == DType::bf16) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) values[i] = bf16_to_float(half(i));
  } else if (dtype == DType::f16) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) values[i] = half_to_float(half(i));
  } else if constexpr (kVec != 8) {
    if (dtype == DType::f32) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) values[i] = __uint_as_float(raw.w[i]);
    } else if (dtype == DType::u8) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) values[i] = (raw.w[i / 4] >> (8 * (i % 4)) & 0xffu) != 0 ? 1 : 0;
    } else if constexpr (sizeof(Acc) == 8) {
#pragma unroll
      for (int i = 0; i < kVec; ++i)
        values[i] = __hiloint2double(static_cast<int>(raw.w[2 * i + 1]), static_cast<int>(raw.w[2 * i]));
    }
  }
}

// Two floats of an output as half precision, in one word.
__device__ __forceinline__ uint32_t encode_halves(DType dtype, float a, float b) {
  const bool half = dtype == DType::f16;
  const uint32_t low = half ? float_to_half(a) : float_to_bf16(a), high = half ? float_to_half(b) : float_to_bf16(b);
  return low | high << 16;
}

template <typename Acc, int kVec>
__device__ __forceinline__ void store(char* to, DType dtype, bool vector, int count, const Acc* values) {
  if (vector && kVec % 4 == 0) {
    if (dtype == DType::f32) {
#pragma unroll
      for (int i = 0; i + 3 < kVec; i += 4)
        *reinterpret_cast<float4*>(to + 4 * i) =
            make_float4(static_cast<float>(values[i]), static_cast<float>(values[i + 1]),
                        static_cast<float>(values[i + 2]), static_cast<float>(values[i + 3]));
      return;
    }
    if (dtype == DType::f64) {
#pragma unroll
      for (int i = 0; i + 1 < kVec; i += 2)
        *reinterpret_cast<double2*>(to + 8 * i) = make_double2(values[i], values[i + 1]);
      return;
    }
    uint32_t w[kVec / 2 + 1];
#pragma unroll
    for (int i = 0; i + 1 < kVec; i += 2)
      w[i / 2] = encode_halves(dtype, static_cast<float>(values[i]), static_cast<float>(values[i + 1]));
    if constexpr (kVec == 8) {
      *reinterpret_cast<uint4*>(to) = make_uint4(w[0], w[1], w[2], w[3]);
    } else if constexpr (kVec == 4) {
      *reinterpret_cast<uint2*>(to) = make_uint2(w[0], w[1]);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    if (i >= count) break;
    switch (dtype) {
      case DType::f32: *reinterpret_cast<float*>(to + 4 * i) = static_cast<float>(values[i]); break;
      case DType::f64: *reinterpret_cast<double*>(to + 8 * i) = static_cast<double>(values[i]); break;
      default:
        *reinterpret_cast<uint16_t*>(to + 2 * i) =
            static_cast<uint16_t>(encode_halves(dtype, static_cast<float>(values[i]), 0.0f) & 0xffffu);
    }
  }
}

template <typename Acc>
__device__ __forceinline__ bool has(const Pass<Acc>& pass, int k) {
  return (pass.given >> k & 1u) != 0;
}

// The address of element e of sample b, in array k.
template <bool kLinear, typename Acc>
__device__ __forceinline__ char* address(const Pass<Acc>& pass, int k, int64_t b, int64_t e) {
  int64_t offset = b * pass.batch_stride[k];
  if constexpr (kLinear) {
    offset += e;
  } else {
    for (int d = pass.ndim - 1; d >= 0; --d) {
      offset += e % pass.sizes[d] * pass.strides[k][d];
      e /= pass.sizes[d];
    }
  }
  return static_cast<char*>(pass.data[k]) + offset * size_of(pass.dtype[k]);
}

// One thread's elements of sample b: kVec of them from e on, `count` of which exist.
template <typename Acc, int kVec, bool kLinear, bool kWide, bool kDraw>
struct Vector {
  static constexpr int kHs = kWide ? kMaxH : 1;
  static constexpr int kOuts = kWide ? kMaxOuts : 1;
  // Vectors of 8 are of halves only.
  static constexpr int kWords = kVec == 8 ? 4 : (kVec * sizeof(Acc) + 3) / 4;

  int64_t b, e;
  int count;
  Raw<kWords> x, m, u, h[kHs], z, mask;

  __device__ __forceinline__ void fetch_one(const Pass<Acc>& pass, int k, Raw<kWords>& raw) {
    if (!has(pass, k)) return;
    const bool vector = kLinear && kVec > 1 && count == kVec && (pass.aligned >> k & 1u) != 0;
    load_bytes<kVec>(address<kLinear>(pass, k, b, e), size_of(pass.dtype[k]), vector, count, raw);
  }

  __device__ __forceinline__ void fetch(const Pass<Acc>& pass, int64_t sample, int64_t element, bool masked) {
    b = sample, e = element;
    const int64_t left = pass.n - e;
    count = left <= 0 ? 0 : left < kVec ? static_cast<int>(left) : kVec;
    if (count == 0) return;
    fetch_one(pass, kX, x);
    fetch_one(pass, kM, m);
    fetch_one(pass, kMUncond, u);
#pragma unroll
    for (int k = 0; k < kHs; ++k) fetch_one(pass, kH0 + k, h[k]);
    if constexpr (!kDraw) fetch_one(pass, kZ, z);
    if (masked) fetch_one(pass, kMask, mask);
  }

  __device__ __forceinline__ void noise(const Pass<Acc>& pass, Acc* values) const {
    const NoiseSource& source = pass.noise;
    const int64_t* device = source.device_key;
    const PhiloxKey key = device != nullptr
                              ? philox_key(static_cast<uint64_t>(device[0]), static_cast<uint64_t>(device[1]))
                              : philox_key(source.seed, source.stream);
    const uint32_t draw = source.draw + (device != nullptr ? static_cast<uint32_t>(device[2]) : 0u);
    const uint64_t id = static_cast<uint64_t>(source.sample_ids != nullptr ? source.sample_ids[b] : b);
    const bool normal = source.draw_kind == Draw::normal;
    if constexpr (kLinear) {
#pragma unroll
      for (int q = 0; q < kVec / 4; ++q) {
        const Words4 words = sample_words(static_cast<uint32_t>(e / 4) + q, draw, id, key);
        const Floats4 four = normal ? normal4(words) : uniform4(words);
#pragma unroll
        for (int i = 0; i < 4; ++i) values[4 * q + i] = four.v[i];
      }
    } else {
      int64_t index = 0, rest = e;
      for (int d = pass.ndim - 1; d >= 0; --d) {
        index += rest % pass.sizes[d] * pass.strides[kIndex][d];
        rest /= pass.sizes[d];
      }
      const Words4 words = sample_words(static_cast<uint32_t>(index / 4), draw, id, key);
      const Floats4 four = normal ? normal4(words) : uniform4(words);
      const int lane = static_cast<int>(index & 3);
      values[0] = lane == 0 ? four.v[0] : lane == 1 ? four.v[1] : lane == 2 ? four.v[2] : four.v[3];
    }
  }

  // out[j][i], by the order of arithmetic of rows.h.
  __device__ __forceinline__ void apply(const Pass<Acc>& pass, const Acc* cells, Acc (*out)[kVec]) const {
    // fma(c, term, -0) is the product c * term to the bit, so that no term need know whether it is the first.
#pragma unroll
    for (int j = 0; j < kOuts; ++j)
#pragma unroll
      for (int i = 0; i < kVec; ++i) out[j][i] = Acc(-0.0);
    auto add = [&](const Acc* term, int cell) {
#pragma unroll
      for (int j = 0; j < kOuts; ++j) {
        if (j >= pass.n_out) break;
        const Acc c = cells[kFirstOut + kOutCells * j + cell];
#pragma unroll
        for (int i = 0; i < kVec; ++i) out[j][i] = fma_(c, term[i], out[j][i]);
      }
    };
    const bool has_x = has(pass, kX), has_m = has(pass, kM);
    Acc xs[kVec], ms[kVec];
    if (has_x) decode<Acc, kVec>(x, pass.dtype[kX], xs);
    if (has_m) decode<Acc, kVec>(m, pass.dtype[kM], ms);
    if (has(pass, kMUncond)) {
      Acc us[kVec];
      decode<Acc, kVec>(u, pass.dtype[kMUncond], us);
      const Acc w = cells[kW];
#pragma unroll
      for (int i = 0; i < kVec; ++i) ms[i] = fma_(w, ms[i] - us[i], us[i]);
    }
    if (pass.use_pred) {
      const Acc a = cells[kA], p = cells[kB], lo = cells[kLo], hi = cells[kHi];
      Acc y[kVec];
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        y[i] = has_x ? a * xs[i] : Acc(-0.0);
        if (has_m) y[i] = fma_(p, ms[i], y[i]);
        y[i] = clamp(y[i], lo, hi);
      }
      add(y, kOutY);
    }
    if (has_x) add(xs, kOutX);
    if (has_m) add(ms, kOutM);
#pragma unroll
    for (int k = 0; k < kHs; ++k) {
      if (has(pass, kH0 + k)) {
        Acc hs[kVec];
        decode<Acc, kVec>(h[k], pass.dtype[kH0 + k], hs);
        add(hs, kOutH0 + k);
      }
    }
    if constexpr (kDraw) {
      Acc zs[kVec];
      noise(pass, zs);
      add(zs, kOutZ);
    } else if (has(pass, kZ)) {
      Acc zs[kVec];
      decode<Acc, kVec>(z, pass.dtype[kZ], zs);
      add(zs, kOutZ);
    }
  }

  __device__ __forceinline__ void put(const Pass<Acc>& pass, int j, const Acc* values) const {
    const int k = kInputs + j;
    const bool vector = kLinear && kVec > 1 && count == kVec && (pass.aligned >> k & 1u) != 0;
    store<Acc, kVec>(address<kLinear>(pass, k, b, e), pass.dtype[k], vector, count, values);
  }
};

// The cells of this thread's sample: the pass's own, or brought into shared memory by the sample's first thread.
// Every thread of the block calls it.
template <typename Acc>
__device__ __forceinline__ const Acc* block_row(const Pass<Acc>& pass, Acc (*rows)[kMaxCells], int64_t b) {
  if (!pass.by_sample) return pass.cells;
  if (threadIdx.x == 0 && b < pass.batch) load_row(pass.rows, b, pass.use_pred, rows[threadIdx.y]);
  __syncthreads();
  return rows[threadIdx.y];
}

// How a pass is laid over the device.
struct Launch {
  dim3 block, grid;
};

// This thread's sample: groups of blockDim.y samples along y and z of the grid (y alone ends at 65535).
__device__ __forceinline__ int64_t sample_of_thread() {
  const int64_t group = blockIdx.y + static_cast<int64_t>(gridDim.y) * blockIdx.z;
  return group * blockDim.y + threadIdx.y;
}

// The first of this thread's elements; none where the thread has no sample.
template <int kVec, typename Acc>
__device__ __forceinline__ int64_t element_of_thread(const Pass<Acc>& pass, int64_t b) {
  return b < pass.batch ? (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * kVec : pass.n;
}

inline int vector_width(const MapArgs& args, const Walk& walk) {
  if (!walk.linear) return 1;
  if (args.f64) return 4;
  for (int k = 0; k < kArrays; ++k)
    if (given(args, k) && size_of(array_of(args, k).dtype) != 2) return 4;
  return 8;
}

template <typename Acc>
Launch plan(const MapArgs& args, const Walk& walk, int vec, Pass<Acc>& pass) {
  for (int k = 0; k < kArrays; ++k) {
    pass.data[k] = nullptr;
    if (!given(args, k)) continue;
    const Array& array = array_of(args, k);
    pass.data[k] = array.data;
    pass.dtype[k] = array.dtype;
    pass.batch_stride[k] = walk.batch_stride[k];
    pass.given |= 1u << k;
    const int64_t bytes = std::min(16, vec * size_of(array.dtype));
    const bool rows_aligned = walk.batch == 1 || walk.batch_stride[k] * size_of(array.dtype) % bytes == 0;
    if (reinterpret_cast<uintptr_t>(array.data) % bytes == 0 && rows_aligned) pass.aligned |= 1u << k;
  }
  pass.batch = walk.batch;
  pass.n = walk.n;
  pass.n_out = args.n_out;
  pass.use_pred = args.use_pred;
  pass.by_sample = args.rows.by_sample();
  for (int c = 0; c < kMaxCells; ++c) pass.cells[c] = static_cast<Acc>(args.rows.base[c]);
  pass.noise = args.noise;
  pass.rows = args.rows;
  pass.ndim = walk.ndim;
  for (int d = 0; d < walk.ndim; ++d) {
    pass.sizes[d] = walk.sizes[d];
    for (int k = 0; k < kWalkArrays; ++k) pass.strides[k][d] = walk.strides[k][d];
  }
  const int64_t vectors = (walk.n + vec - 1) / vec;
  int tx = kThreads / kMaxRows;
  while (tx < kThreads && tx < vectors) tx *= 2;
  const int ty = kThreads / tx;
  pass.tiles = (vectors + tx - 1) / tx;
  const int64_t groups = (walk.batch + ty - 1) / ty, along_y = std::min<int64_t>(groups, 32768);
  return {dim3(tx, ty), dim3(static_cast<unsigned>(pass.tiles), static_cast<unsigned>(along_y),
                             static_cast<unsigned>((groups + along_y - 1) / std::max<int64_t>(along_y, 1)))};
}

// Whether a pass has more terms or outputs than the narrow kernels hold in registers.
inline bool is_wide(const MapArgs& args) {
  return args.n_out > 1 || args.in[kH1].data != nullptr || args.in[kH2].data != nullptr;
}

// Null, or what the runtime says of the last launch.
inline const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace
}  // namespace genkern
