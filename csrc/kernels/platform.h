// What host and device code share: the annotation of functions, and the few arithmetic operations whose rounding is
// part of a contract. Host code is built with -ffp-contract=off, device code with -fmad=false, so that the only fused
// multiply-adds are those named fma_.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

// Always inlined: the host's files are compiled once for each instruction set, and an out-of-line copy would be one
// that the linker may take from a file compiled for a newer CPU.
#if defined(__CUDACC__)
#define GENKERN_HD __host__ __device__ __forceinline__
#else
#define GENKERN_HD inline __attribute__((always_inline))
#endif

namespace genkern {
namespace {

// a b + c, rounded once.
GENKERN_HD float fma_(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return std::fma(a, b, c);
#endif
}

GENKERN_HD double fma_(double a, double b, double c) {
#if defined(__CUDA_ARCH__)
  return __fma_rn(a, b, c);
#else
  return std::fma(a, b, c);
#endif
}

// The correctly rounded square root, whatever -prec-sqrt says.
GENKERN_HD float sqrt_(float a) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(a);
#else
  return std::sqrt(a);
#endif
}

// The same of a number that is neither 0, subnormal nor infinite. On CUDA the steps that __fsqrt_rn takes for such a
// number, without its branch and call for the others, which keep the compiler from interleaving independent roots.
GENKERN_HD float sqrt_normal(float a) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(a));
  const float root = a * y, half = 0.5f * y;
  return __fmaf_rn(__fmaf_rn(-root, root, a), half, root);
#else
  return std::sqrt(a);
#endif
}

GENKERN_HD double sqrt_(double a) {
#if defined(__CUDA_ARCH__)
  return __dsqrt_rn(a);
#else
  return std::sqrt(a);
#endif
}

GENKERN_HD uint32_t bits_of(float a) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(a);
#else
  uint32_t bits;
  std::memcpy(&bits, &a, sizeof bits);
  return bits;
#endif
}

GENKERN_HD float float_of(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float a;
  std::memcpy(&a, &bits, sizeof a);
  return a;
#endif
}

GENKERN_HD uint64_t bits_of(double a) {
#if defined(__CUDA_ARCH__)
  return static_cast<uint64_t>(__double_as_longlong(a));
#else
  uint64_t bits;
  std::memcpy(&bits, &a, sizeof bits);
  return bits;
#endif
}

GENKERN_HD double float_of(uint64_t bits) {
#if defined(__CUDA_ARCH__)
  return __longlong_as_double(static_cast<long long>(bits));
#else
  double a;
  std::memcpy(&a, &bits, sizeof a);
  return a;
#endif
}

}  // namespace
}  // namespace genkern
