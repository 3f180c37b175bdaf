// Vectors of GENKERN_ISA: how elements of any type in memory become one vector of the arithmetic's type, and back.
//
// GCC's and clang's vector types carry the arithmetic; intrinsics are for what they have no operator for (the fused
// multiply-add, F16C) or translate badly (packing 32 bits into 16). A type whose conversion is rare goes lane by lane.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <type_traits>

#include "exp.h"
#include "half.h"
#include "kernels.h"

namespace genkern {
namespace GENKERN_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename T, int kBytes>
struct VectorType {
  typedef T type __attribute__((vector_size(kBytes)));
};

template <typename Acc>
constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(Acc));
template <typename Acc>
using Vec = typename VectorType<Acc, kVectorBytes>::type;

using Floats = Vec<float>;
using Words = Vec<uint32_t>;
using Shorts = typename VectorType<uint16_t, kVectorBytes / 2>::type;

// Elements of memory that C++ has no type for.
struct Bf16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <typename Vector>
GENKERN_HD Vector load_bytes(const void* from) {
  Vector v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

// v in every lane. v - 0 is v, of -0 too.
template <typename Acc>
GENKERN_HD Vec<Acc> splat(Acc v) {
  return v - Vec<Acc>{};
}

// a b + c, rounded once, in every lane.
GENKERN_HD Floats fma_lanes(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  for (int l = 0; l < kWidth<float>; ++l) c[l] = fma_(a[l], b[l], c[l]);
  return c;
#endif
}

GENKERN_HD Vec<double> fma_lanes(Vec<double> a, Vec<double> b, Vec<double> c) {
#if defined(__AVX512F__)
  return (Vec<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__AVX2__)
  return (Vec<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  for (int l = 0; l < kWidth<double>; ++l) c[l] = fma_(a[l], b[l], c[l]);
  return c;
#endif
}

// A vector, as exp.h has it.
template <typename Acc_>
struct OneVector {
  using Acc = Acc_;
  using Value = Vec<Acc>;
  using Bits = Vec<typename ExpOf<Acc>::Bits>;

  static GENKERN_HD Value all(Acc a) { return splat(a); }
  static GENKERN_HD Value fma(Value a, Value b, Value c) { return fma_lanes(a, b, c); }
  static GENKERN_HD Bits bits(Value a) { return (Bits)a; }
  static GENKERN_HD Value of_bits(Bits a) { return (Value)a; }
};

// One element.
GENKERN_HD float widen(float v) { return v; }
GENKERN_HD double widen(double v) { return v; }
GENKERN_HD float widen(Bf16 v) { return bf16_to_float(v.bits); }
GENKERN_HD float widen(Half v) { return half_to_float(v.bits); }
template <typename Acc>
GENKERN_HD void narrow(Acc v, float& to) {
  to = static_cast<float>(v);
}
template <typename Acc>
GENKERN_HD void narrow(Acc v, double& to) {
  to = static_cast<double>(v);
}
template <typename Acc>
GENKERN_HD void narrow(Acc v, Bf16& to) {
  to.bits = float_to_bf16(static_cast<float>(v));
}
template <typename Acc>
GENKERN_HD void narrow(Acc v, Half& to) {
  to.bits = float_to_half(static_cast<float>(v));
}

// Shorts in the low halves of words.
GENKERN_HD Words words_of(Shorts v) {
#if defined(__AVX512F__)
  return (Words)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)v);
#elif defined(__AVX2__)
  return (Words)_mm256_cvtepu16_epi32((__m128i)v);
#else
  return __builtin_convertvector(v, Words);
#endif
}

// A vector of elements from memory.
template <typename Acc, typename Element>
GENKERN_HD Vec<Acc> load_lanes(const Element* from) {
  if constexpr (std::is_same_v<Acc, Element>) {
    return load_bytes<Vec<Acc>>(from);
  } else if constexpr (std::is_same_v<Acc, float> && std::is_same_v<Element, Bf16>) {
    return (Floats)(words_of(load_bytes<Shorts>(from)) << 16);
#if defined(__AVX512F__)
  } else if constexpr (std::is_same_v<Acc, float> && std::is_same_v<Element, Half>) {
    return (Floats)_mm512_maskz_cvtph_ps(0xffff, load_bytes<__m256i>(from));
#elif defined(__AVX2__)
  } else if constexpr (std::is_same_v<Acc, float> && std::is_same_v<Element, Half>) {
    return (Floats)_mm256_cvtph_ps(load_bytes<__m128i>(from));
#endif
  } else {
    Vec<Acc> v;
    for (int l = 0; l < kWidth<Acc>; ++l) v[l] = static_cast<Acc>(widen(from[l]));
    return v;
  }
}

// float_to_bf16 of every lane.
GENKERN_HD Shorts bf16_lanes(Floats v) {
  const Words u = (Words)v;
  const Words rounded = u + 0x7fffu + ((u >> 16) & 1u);
  const Words bits = (v == v ? rounded : u | 0x400000u) >> 16;
#if defined(__AVX512F__)
  return (Shorts)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)bits);
#elif defined(__AVX2__)
  return (Shorts)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)bits), _mm256_extracti128_si256((__m256i)bits, 1));
#else
  return __builtin_convertvector(bits, Shorts);
#endif
}

template <typename Acc, typename Element>
GENKERN_HD void store_lanes(Vec<Acc> v, Element* to) {
  if constexpr (std::is_same_v<Acc, Element>) {
    std::memcpy(to, &v, sizeof v);
  } else if constexpr (std::is_same_v<Acc, float> && std::is_same_v<Element, Bf16>) {
    const Shorts bits = bf16_lanes(v);
    std::memcpy(to, &bits, sizeof bits);
#if defined(__AVX512F__)
  } else if constexpr (std::is_same_v<Acc, float> && std::is_same_v<Element, Half>) {
    const __m256i bits = _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    std::memcpy(to, &bits, sizeof bits);
#elif defined(__AVX2__)
  } else if constexpr (std::is_same_v<Acc, float> && std::is_same_v<Element, Half>) {
    const __m128i bits = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    std::memcpy(to, &bits, sizeof bits);
#endif
  } else {
    for (int l = 0; l < kWidth<Acc>; ++l) narrow(v[l], to[l]);
  }
}

// The same past the caches, where the CPU has such stores; `to` is aligned to the vector. Other threads see them after
// end_streams().
template <typename Acc>
GENKERN_HD void stream_lanes(Vec<Acc> v, Acc* to) {
#if defined(__AVX512F__)
  _mm512_stream_si512((__m512i*)to, (__m512i)v);
#elif defined(__AVX2__)
  _mm256_stream_si256((__m256i*)to, (__m256i)v);
#elif defined(__x86_64__)
  _mm_stream_si128((__m128i*)to, (__m128i)v);
#else
  std::memcpy(to, &v, sizeof v);
#endif
}

GENKERN_HD void end_streams() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace GENKERN_ISA
}  // namespace genkern
