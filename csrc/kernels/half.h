// float16 and bfloat16 to and from float32, rounded to nearest even: on the CPU in integer arithmetic, which has the
// bits of the hardware's conversions (NaN's payload aside) and vectorises on every instruction set; on CUDA the
// hardware's own.
#pragma once

#include "platform.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#elif defined(__F16C__)
#include <immintrin.h>
#endif

namespace genkern {
namespace {

GENKERN_HD float bf16_to_float(uint16_t h) { return float_of(static_cast<uint32_t>(h) << 16); }

GENKERN_HD uint16_t float_to_bf16(float f) {
#if defined(__CUDA_ARCH__)
  return __bfloat16_as_ushort(__float2bfloat16_rn(f));
#else
  const uint32_t u = bits_of(f);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const uint32_t nan = (u >> 16) | 0x40u;
  return static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
#endif
}

GENKERN_HD float half_to_float(uint16_t h) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(h));
#else
  constexpr uint32_t kExponent = 0x7c00u << 13;
  uint32_t u = (h & 0x7fffu) << 13;
  const uint32_t exponent = u & kExponent;
  u += (127u - 15u) << 23;
  u += exponent == kExponent ? (128u - 16u) << 23 : 0u;  // infinity, NaN
  // Subnormal: one exponent up, then take the implicit one off again in float arithmetic.
  const uint32_t subnormal = bits_of(float_of(u + (1u << 23)) - float_of(113u << 23));
  u = exponent == 0 ? subnormal : u;
  return float_of(u | (static_cast<uint32_t>(h & 0x8000u) << 16));
#endif
}

GENKERN_HD uint16_t float_to_half(float f) {
#if defined(__CUDA_ARCH__)
  return __half_as_ushort(__float2half_rn(f));
#else
  const uint32_t u = bits_of(f);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t a = u & 0x7fffffffu;
  const uint32_t normal = (a + ((15u - 127u) << 23) + 0xfffu + ((a >> 13) & 1u)) >> 13;
  // Below 2^-14: adding 1/2 leaves the rounded subnormal in the low bits.
  const uint32_t subnormal = bits_of(float_of(a) + 0.5f) - 0x3f000000u;
  uint32_t h = a < (113u << 23) ? subnormal : normal;
  h = a >= (143u << 23) ? 0x7c00u : h;  // 65536 and above; 65520 to 65536 rounds up into it by itself
  h = a > 0x7f800000u ? (0x7e00u | ((a >> 13) & 0x3ffu)) : h;
  return static_cast<uint16_t>(h | sign);
#endif
}

// Two of them in one word, the first low: one instruction on CUDA.
GENKERN_HD uint32_t floats_to_bf162(float a, float b) {
#if defined(__CUDA_ARCH__)
  const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
  return static_cast<uint32_t>(__bfloat16_as_ushort(pair.x)) | static_cast<uint32_t>(__bfloat16_as_ushort(pair.y))
                                                                   << 16;
#else
  return static_cast<uint32_t>(float_to_bf16(a)) | static_cast<uint32_t>(float_to_bf16(b)) << 16;
#endif
}

GENKERN_HD uint32_t floats_to_half2(float a, float b) {
#if defined(__CUDA_ARCH__)
  const __half2 pair = __floats2half2_rn(a, b);
  return static_cast<uint32_t>(__half_as_ushort(pair.x)) | static_cast<uint32_t>(__half_as_ushort(pair.y)) << 16;
#else
  return static_cast<uint32_t>(float_to_half(a)) | static_cast<uint32_t>(float_to_half(b)) << 16;
#endif
}

#if !defined(__CUDACC__)
// Runs of them: with F16C by its instructions (four times fewer than the integer form takes), else one by one.
inline void halves_to_floats(const uint16_t* from, float* to, int64_t n) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
#endif
  for (; i < n; ++i) to[i] = half_to_float(from[i]);
}

inline void floats_to_halves(const float* from, uint16_t* to, int64_t n) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#endif
  for (; i < n; ++i) to[i] = float_to_half(from[i]);
}
#endif

}  // namespace
}  // namespace genkern
