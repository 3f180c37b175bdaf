// Random numbers as a function of (seed, stream, draw, sample id, i), the same bits on CPU and CUDA.
//
//   key     = seed xor mix64(stream), low word first
//   counter = (i / 4, draw, sample id low, sample id high)
//   w0..w3  = Philox-4x32-10(counter, key), of which element i takes number i mod 4
//
//   uniform   u = (w + 1/2) 2^-32
//   normals   z0 = r cos(2 pi w1 2^-32), z1 = r sin(2 pi w1 2^-32), r = sqrt(-2 log((w0 + 1/2) 2^-32));  z2, z3 from
//   w2, w3
//
// Logarithm, sine and cosine are minimax polynomials (tools/minimax.py), evaluated in one order of fused multiply-adds;
// every other float operation is correctly rounded, and integers are converted as int32. So every path has the same
// bits, which tests/data/noise_vectors.json freezes. |error| <= 4e-7 max(1, |z|) against the formula in exact
// arithmetic.
//
// Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3"; Steele, Lea, Flood 2014, "Fast
// splittable pseudorandom number generators" (mix64); Box, Muller 1958.
#pragma once

#include "platform.h"

namespace genkern {
namespace {

struct PhiloxKey {
  uint32_t k0, k1;
};

struct Words4 {
  uint32_t w[4];
};

struct Floats4 {
  float v[4];
};

// The finaliser of splitmix64, a bijection of 64-bit words with mix64(0) = 0.
GENKERN_HD uint64_t mix64(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

GENKERN_HD PhiloxKey philox_key(uint64_t seed, uint64_t stream) {
  const uint64_t key = seed ^ mix64(stream);
  return {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)};
}

constexpr uint32_t kPhiloxM0 = 0xd2511f53u, kPhiloxM1 = 0xcd9e8d57u;
constexpr uint32_t kPhiloxW0 = 0x9e3779b9u, kPhiloxW1 = 0xbb67ae85u;  // 2^32 over the golden ratio, 2^32 (sqrt(3) - 1)

GENKERN_HD Words4 philox4x32_10(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, PhiloxKey key) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(c0) * kPhiloxM0;
    const uint64_t p1 = static_cast<uint64_t>(c2) * kPhiloxM1;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ key.k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ key.k1;
    c3 = static_cast<uint32_t>(p0);
    key.k0 += kPhiloxW0;
    key.k1 += kPhiloxW1;
  }
  return {{c0, c1, c2, c3}};
}

// The keys of the ten rounds, for many counters under one key.
struct PhiloxRounds {
  uint32_t k0[10], k1[10];
};

GENKERN_HD PhiloxRounds philox_rounds(PhiloxKey key) {
  PhiloxRounds keys;
  for (uint32_t round = 0; round < 10; ++round) {
    keys.k0[round] = key.k0 + round * kPhiloxW0;
    keys.k1[round] = key.k1 + round * kPhiloxW1;
  }
  return keys;
}

GENKERN_HD Words4 philox4x32_10(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, const PhiloxRounds& keys) {
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(c0) * kPhiloxM0;
    const uint64_t p1 = static_cast<uint64_t>(c2) * kPhiloxM1;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ keys.k0[round];
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ keys.k1[round];
    c3 = static_cast<uint32_t>(p0);
  }
  return {{c0, c1, c2, c3}};
}

// The words of quad i / 4 of a sample.
GENKERN_HD Words4 sample_words(uint32_t quad, uint32_t draw, uint64_t sample_id, PhiloxKey key) {
  return philox4x32_10(quad, draw, static_cast<uint32_t>(sample_id), static_cast<uint32_t>(sample_id >> 32), key);
}

// -2 log(1 - g/2) = g + g^2 R(g), 1 - g/2 in [sqrt(1/2), sqrt(2)]
// largest weighted error 7.6e-08 (7.4e-08 before the coefficients were rounded)
constexpr float kLog0 = 0x1.0000c4p-2f;
constexpr float kLog1 = 0x1.555a64p-4f;
constexpr float kLog2 = 0x1.ff35f8p-6f;
constexpr float kLog3 = 0x1.974fd8p-7f;
constexpr float kLog4 = 0x1.62d618p-8f;
constexpr float kLog5 = 0x1.4e8ddep-9f;
constexpr float kLog6 = 0x1.9b04cep-11f;
// sin(pi/4 v) = v S(v^2), |v| <= 1
// largest weighted error 2.8e-08 (3.2e-09 before the coefficients were rounded)
constexpr float kSin0 = 0x1.921fb6p-1f;
constexpr float kSin1 = -0x1.4abc24p-4f;
constexpr float kSin2 = 0x1.4680a4p-9f;
constexpr float kSin3 = -0x1.33198ep-15f;
// cos(pi/4 v) = 1 + v^2 C(v^2), |v| <= 1
// largest weighted error 3.9e-08 (3.8e-08 before the coefficients were rounded)
constexpr float kCos0 = -0x1.3bd39cp-2f;
constexpr float kCos1 = 0x1.03b058p-6f;
constexpr float kCos2 = -0x1.4e78bep-12f;
constexpr float kMinus2Ln2 = -0x1.62e43p-23f;

// sqrt(-2 log u), u = (w + 1/2) 2^-32.
//
// x = min(u, 1 - u) is rounded, to 24 bits wherever u lies, so that -log(1 - x) keeps its digits near u = 1. With
// u = 2^e (1 - g/2), e and g are read off the bits of u; where e = 0 (only above sqrt(1/2)) g = 2 x. x and u are
// carried doubled, so that g is at hand.
GENKERN_HD float box_muller_radius(uint32_t w) {
  const int32_t word = static_cast<int32_t>(w);
  const float x2 = fma_(static_cast<float>(word ^ (word >> 31)), 0x1p-31f, 0x1p-32f);
  const float u2 = word < 0 ? 2.0f - x2 : x2;
  const uint32_t e = (bits_of(u2) - 0x3fb504f3u) & 0xff800000u;  // from the bits of sqrt(2): e 2^23
  const float g = e == 0 ? x2 : 2.0f - float_of(bits_of(u2) - e);
  float p = fma_(kLog6, g, kLog5);
  p = fma_(p, g, kLog4);
  p = fma_(p, g, kLog3);
  p = fma_(p, g, kLog2);
  p = fma_(p, g, kLog1);
  p = fma_(p, g, kLog0);
  p = fma_(g * g, p, g);
  return sqrt_normal(fma_(static_cast<float>(static_cast<int32_t>(e)), kMinus2Ln2, p));  // in [2^-32, 46]
}

// z0 = r cos(2 pi w1 2^-32), z1 = r sin(2 pi w1 2^-32), r from w0.
//
// The angle is quadrant pi/2 + v pi/4, |v| <= 1: bits 30 and 31 of h are the quadrant, the lower 30 of w1, as a signed
// number, are v 2^29.
GENKERN_HD void box_muller(uint32_t w0, uint32_t w1, float& z0, float& z1) {
  const float r = box_muller_radius(w0);
  const uint32_t h = w1 + 0x20000000u;
  const float v = static_cast<float>(static_cast<int32_t>(w1 << 2)) * 0x1p-31f;
  const float v2 = v * v;
  float s = fma_(kSin3, v2, kSin2);
  s = fma_(s, v2, kSin1);
  s = v * fma_(s, v2, kSin0);
  float c = fma_(kCos2, v2, kCos1);
  c = fma_(c, v2, kCos0);
  c = fma_(c, v2, 1.0f);
  const float signed_r = float_of(bits_of(r) ^ (h & 0x80000000u));  // minus in quadrants 2 and 3
#if defined(__CUDA_ARCH__)
  // The instruction that masks the bit says whether it is set, unless the compiler sees one bit and shifts it down.
  uint32_t bit;
  asm("and.b32 %0, %1, 0x40000000;" : "=r"(bit) : "r"(h));
  const bool odd = bit != 0;
  const float cosine = odd ? -s : c, sine = odd ? c : s;
#else  // in AVX2 a selection takes three operations, and exchanging by exclusive ors fewer than two selections
  const uint32_t odd = static_cast<uint32_t>(static_cast<int32_t>(h << 1) >> 31);
  const uint32_t exchange = (bits_of(s) ^ bits_of(c)) & odd;
  const float cosine = float_of(bits_of(c) ^ exchange ^ (odd & 0x80000000u)), sine = float_of(bits_of(s) ^ exchange);
#endif
  z0 = signed_r * cosine;
  z1 = signed_r * sine;
}

GENKERN_HD Floats4 normal4(const Words4& words) {
  Floats4 z;
  box_muller(words.w[0], words.w[1], z.v[0], z.v[1]);
  box_muller(words.w[2], words.w[3], z.v[2], z.v[3]);
  return z;
}

// (w + 1/2) 2^-32 rounded to nearest, and where that is 1 (the 128 highest words) the float below it: 0 < u < 1 always.
// The halves of w are exact, so the outer fma rounds once.
GENKERN_HD float uniform(uint32_t w) {
  const float low = fma_(static_cast<float>(static_cast<int32_t>(w & 0xffffu)), 0x1p-32f, 0x1p-33f);
  const float u = fma_(static_cast<float>(static_cast<int32_t>(w >> 16)), 0x1p-16f, low);
  return u < 0x1.fffffep-1f ? u : 0x1.fffffep-1f;
}

GENKERN_HD Floats4 uniform4(const Words4& words) {
  return {{uniform(words.w[0]), uniform(words.w[1]), uniform(words.w[2]), uniform(words.w[3])}};
}

}  // namespace
}  // namespace genkern
