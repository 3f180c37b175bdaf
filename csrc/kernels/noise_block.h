// Runs of a sample's noise on the CPU: philox.h in stages whose buffers stay in the first cache. Box-Muller is a plain
// loop that the compiler vectorises for GENKERN_ISA; Philox is written on vectors, since GCC's own widening products
// cost twenty shuffles a round (2.2 ns a word with AVX2, against 0.8).
#pragma once

#include "lanes.h"
#include "philox.h"

namespace genkern {
namespace GENKERN_ISA {
namespace {

typedef uint64_t Lanes __attribute__((vector_size(kVectorBytes)));

constexpr int kStage = 64;               // quads, or elements, a stage
constexpr int kStep = kVectorBytes / 4;  // of them a step of Philox
constexpr int kStepsAtOnce = 2;
static_assert(kStage % (kStepsAtOnce * kStep) == 0, "a stage is whole steps");

// The products of the low halves of lanes.
inline Lanes multiply_low_halves(Lanes a, uint32_t b) {
  const Lanes factor = Lanes{} + b;
#if defined(__AVX512F__)
  return (Lanes)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)factor);
#elif defined(__AVX2__)
  return (Lanes)_mm256_mul_epu32((__m256i)a, (__m256i)factor);
#elif defined(__x86_64__)
  return (Lanes)_mm_mul_epu32((__m128i)a, (__m128i)factor);
#else
  return (a & 0xffffffffu) * factor;
#endif
}

// The low halves of the lanes of `low`, with those of `high` above them.
inline Lanes join_low_halves(Lanes low, Lanes high) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  return (Lanes)_mm256_blend_epi32((__m256i)low, (__m256i)(high << 32), 0xaa);
#else
  return (low & 0xffffffffu) | (high << 32);
#endif
}

// Word k of quad[i] into w[k][i], i < n rounded up to whole steps: philox4x32_10 on the low halves of lanes, whose high
// halves hold anything. Neighbouring quads are the halves of one lane in memory; the two vectors that they make, and
// those of the next step, advance side by side, since a round is a chain of eight cycles: 0.88 of the time of one step
// after the other with AVX-512, 0.95 with AVX2. (Four steps spill: 1.7 of it with AVX2.)
inline void stage_words(const uint32_t* quad, int n, const PhiloxKey& first_key, uint32_t draw, uint64_t sample_id,
                        uint32_t (*w)[kStage]) {
  constexpr int kVectors = 2 * kStepsAtOnce;
  for (int i = 0; i < n; i += kStepsAtOnce * kStep) {
    Lanes c[4][kVectors];
    for (int v = 0; v < kVectors; v += 2) {
      std::memcpy(&c[0][v], quad + i + v / 2 * kStep, sizeof(Lanes));
      c[0][v + 1] = c[0][v] >> 32;
    }
    for (int v = 0; v < kVectors; ++v) {
      c[1][v] = Lanes{} + draw;
      c[2][v] = Lanes{} + (sample_id & 0xffffffffu);
      c[3][v] = Lanes{} + (sample_id >> 32);
    }
    PhiloxKey key = first_key;
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const Lanes p0 = multiply_low_halves(c[0][v], kPhiloxM0);
        const Lanes p1 = multiply_low_halves(c[2][v], kPhiloxM1);
        c[0][v] = (p1 >> 32) ^ (c[1][v] ^ key.k0);
        c[1][v] = p1;
        c[2][v] = (p0 >> 32) ^ (c[3][v] ^ key.k1);
        c[3][v] = p0;
      }
      key.k0 += kPhiloxW0;
      key.k1 += kPhiloxW1;
    }
    for (int k = 0; k < 4; ++k) {
      for (int v = 0; v < kVectors; v += 2) {
        const Lanes both = join_low_halves(c[k][v], c[k][v + 1]);
        std::memcpy(w[k] + i + v / 2 * kStep, &both, sizeof both);
      }
    }
  }
}

struct Normals {
  static void stage(const uint32_t (*w)[kStage], int n, float (*z)[kStage]) {
    for (int k = 0; k < 4; k += 2)
      for (int i = 0; i < n; ++i) box_muller(w[k][i], w[k + 1][i], z[k][i], z[k + 1][i]);
  }

  // The number of the element whose place in its quad is `lane`.
  static GENKERN_HD float pick(const uint32_t (*w)[kStage], int i, uint32_t lane) {
    const uint32_t w0 = w[0][i], w1 = w[1][i], w2 = w[2][i], w3 = w[3][i];
    float z0, z1;
    box_muller((lane & 2) != 0 ? w2 : w0, (lane & 2) != 0 ? w3 : w1, z0, z1);
    return (lane & 1) != 0 ? z1 : z0;
  }
};

struct Uniforms {
  static void stage(const uint32_t (*w)[kStage], int n, float (*u)[kStage]) {
    for (int k = 0; k < 4; ++k)
      for (int i = 0; i < n; ++i) u[k][i] = uniform(w[k][i]);
  }

  static GENKERN_HD float pick(const uint32_t (*w)[kStage], int i, uint32_t lane) {
    const uint32_t w0 = w[0][i], w1 = w[1][i], w2 = w[2][i], w3 = w[3][i];
    const uint32_t low = (lane & 1) != 0 ? w1 : w0;
    const uint32_t high = (lane & 1) != 0 ? w3 : w2;
    return uniform((lane & 2) != 0 ? high : low);
  }
};

inline int whole_steps(int n) { return (n + kStep - 1) / kStep * kStep; }

// The quad that lane i of a step draws. Shuffles work within 16 bytes, four lanes: with neighbouring quads in different
// fours, interleaving the numbers of a step leaves every four where memory wants it.
constexpr uint32_t quad_of_lane(int i) {
  constexpr int kFours = kStep / 4;
  return static_cast<uint32_t>(i % 4 * kFours + i / 4);
}

// Numbers 4 q + k of a step from lane i of numbers[k], q = quad_of_lane(i).
inline void store_step(const float (*numbers)[kStage], int at, float* to) {
  const float *z0 = numbers[0] + at, *z1 = numbers[1] + at, *z2 = numbers[2] + at, *z3 = numbers[3] + at;
#if defined(__AVX512F__)
  constexpr __mmask16 kAll = 0xffff;
  constexpr __mmask8 kPairs = 0xff;
  const auto low = [](__m512 a, __m512 b) { return (__m512d)_mm512_maskz_unpacklo_ps(kAll, a, b); };
  const auto high = [](__m512 a, __m512 b) { return (__m512d)_mm512_maskz_unpackhi_ps(kAll, a, b); };
  const __m512 a = _mm512_loadu_ps(z0), b = _mm512_loadu_ps(z1), c = _mm512_loadu_ps(z2), d = _mm512_loadu_ps(z3);
  const __m512d ab = low(a, b), cd = low(c, d), ab2 = high(a, b), cd2 = high(c, d);
  _mm512_storeu_pd(to, _mm512_maskz_unpacklo_pd(kPairs, ab, cd));
  _mm512_storeu_pd(to + 16, _mm512_maskz_unpackhi_pd(kPairs, ab, cd));
  _mm512_storeu_pd(to + 32, _mm512_maskz_unpacklo_pd(kPairs, ab2, cd2));
  _mm512_storeu_pd(to + 48, _mm512_maskz_unpackhi_pd(kPairs, ab2, cd2));
#elif defined(__AVX2__)
  const __m256 a = _mm256_loadu_ps(z0), b = _mm256_loadu_ps(z1), c = _mm256_loadu_ps(z2), d = _mm256_loadu_ps(z3);
  const __m256d ab = (__m256d)_mm256_unpacklo_ps(a, b), ab2 = (__m256d)_mm256_unpackhi_ps(a, b);
  const __m256d cd = (__m256d)_mm256_unpacklo_ps(c, d), cd2 = (__m256d)_mm256_unpackhi_ps(c, d);
  _mm256_storeu_ps(to, (__m256)_mm256_unpacklo_pd(ab, cd));
  _mm256_storeu_ps(to + 8, (__m256)_mm256_unpackhi_pd(ab, cd));
  _mm256_storeu_ps(to + 16, (__m256)_mm256_unpacklo_pd(ab2, cd2));
  _mm256_storeu_ps(to + 24, (__m256)_mm256_unpackhi_pd(ab2, cd2));
#else
  for (int i = 0; i < kStep; ++i) {
    float* quad = to + 4 * quad_of_lane(i);
    quad[0] = z0[i], quad[1] = z1[i], quad[2] = z2[i], quad[3] = z3[i];
  }
#endif
}

template <typename Numbers>
void fill(float* to, uint64_t first_quad, int quads, const PhiloxKey& key, uint32_t draw, uint64_t sample_id) {
  alignas(64) uint32_t quad[kStage], words[4][kStage], in_stage[kStage];
  alignas(64) float numbers[4][kStage];
  for (int i = 0; i < kStage; ++i) in_stage[i] = static_cast<uint32_t>(i / kStep * kStep) + quad_of_lane(i % kStep);
  for (int q = 0; q < quads; q += kStage) {
    const int n = quads - q < kStage ? quads - q : kStage, steps = whole_steps(n);
    const uint32_t first = static_cast<uint32_t>(first_quad) + static_cast<uint32_t>(q);
    for (int i = 0; i < kStage; ++i) quad[i] = first + in_stage[i];
    stage_words(quad, steps, key, draw, sample_id, words);
    Numbers::stage(words, steps, numbers);
    float* stage = to + 4 * static_cast<int64_t>(q);
    int i = 0;
    for (; i + kStep <= n; i += kStep) store_step(numbers, i, stage + 4 * i);
    if (i < n) {
      float last[4 * kStep];
      store_step(numbers, i, last);
      std::memcpy(stage + 4 * i, last, sizeof(float) * 4 * static_cast<size_t>(n - i));
    }
  }
}

template <typename Numbers>
void fill_at(float* to, const uint64_t* index, int count, const PhiloxKey& key, uint32_t draw, uint64_t sample_id) {
  alignas(64) uint32_t quad[kStage] = {}, lane[kStage] = {}, words[4][kStage];
  alignas(64) float numbers[kStage];
  for (int begin = 0; begin < count; begin += kStage) {
    const int n = count - begin < kStage ? count - begin : kStage, steps = whole_steps(n);
    for (int i = 0; i < n; ++i) quad[i] = static_cast<uint32_t>(index[begin + i] >> 2);
    for (int i = 0; i < n; ++i) lane[i] = static_cast<uint32_t>(index[begin + i]) & 3u;
    stage_words(quad, steps, key, draw, sample_id, words);
    for (int i = 0; i < steps; ++i) numbers[i] = Numbers::pick(words, i, lane[i]);
    std::memcpy(to + begin, numbers, sizeof(float) * static_cast<size_t>(n));
  }
}

// Standard normals of 4 * quads elements of a sample, from element 4 * first_quad on.
inline void fill_normals(float* z, uint64_t first_quad, int quads, const PhiloxKey& key, uint32_t draw,
                         uint64_t sample_id) {
  fill<Normals>(z, first_quad, quads, key, draw, sample_id);
}

inline void fill_uniforms(float* u, uint64_t first_quad, int quads, const PhiloxKey& key, uint32_t draw,
                          uint64_t sample_id) {
  fill<Uniforms>(u, first_quad, quads, key, draw, sample_id);
}

// Standard normals of the elements index[0 .. count - 1] of a sample.
inline void normals_at(float* z, const uint64_t* index, int count, const PhiloxKey& key, uint32_t draw,
                       uint64_t sample_id) {
  fill_at<Normals>(z, index, count, key, draw, sample_id);
}

inline void uniforms_at(float* u, const uint64_t* index, int count, const PhiloxKey& key, uint32_t draw,
                        uint64_t sample_id) {
  fill_at<Uniforms>(u, index, count, key, draw, sample_id);
}

}  // namespace
}  // namespace GENKERN_ISA
}  // namespace genkern
