// A thread's elements as they lie in memory, and their conversion: raw words are fetched first, of every term, and
// decoded after, so that several independent loads are in flight.
#pragma once

#include <cuda_runtime.h>

#include "facts_cuda.cuh"
#include "half.h"

namespace genkern {
namespace {

template <int kWords>
struct Raw {
  uint32_t w[kWords];
};

// kVec elements of `size` bytes, where they are aligned to a vector; else the first `count` of them one by one.
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
  } else if (dtype == DType::u8) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) values[i] = (raw.w[i / 4] >> (8 * (i % 4)) & 0xffu) != 0 ? 1 : 0;
  } else if (dtype == DType::f32) {
    if constexpr (kWords >= kVec) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) values[i] = __uint_as_float(raw.w[i]);
    }
  } else if constexpr (sizeof(Acc) == 8) {
#pragma unroll
    for (int i = 0; i < kVec; ++i)
      values[i] = __hiloint2double(static_cast<int>(raw.w[2 * i + 1]), static_cast<int>(raw.w[2 * i]));
  }
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
    for (int i = 0; i + 1 < kVec; i += 2) {
      const float a = static_cast<float>(values[i]), b = static_cast<float>(values[i + 1]);
      w[i / 2] = dtype == DType::f16 ? floats_to_half2(a, b) : floats_to_bf162(a, b);
    }
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
    const auto value = static_cast<float>(values[i]);
    switch (dtype) {
      case DType::f32: *reinterpret_cast<float*>(to + 4 * i) = value; break;
      case DType::f64: *reinterpret_cast<double*>(to + 8 * i) = static_cast<double>(values[i]); break;
      case DType::f16: *reinterpret_cast<uint16_t*>(to + 2 * i) = float_to_half(value); break;
      default: *reinterpret_cast<uint16_t*>(to + 2 * i) = float_to_bf16(value);
    }
  }
}

}  // namespace
}  // namespace genkern
