// Runs of a sample's noise on the CPU: philox.h in stages whose buffers stay in the first cache. Box-Muller is a plain loop
// that the compiler vectorises for GENKERN_ISA; Philox is written on vectors, since GCC's own widening products cost
// twelve shuffles a round (2.2 ns a word with AVX2, against 0.5).
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "philox.h"

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

typedef uint64_t Lanes __attribute__((vector_size(kVectorBytes)));

constexpr int kStage = 64;                  // quads, or elements, a stage
constexpr int kStep = kVectorBytes / 4;     // of them a step of Philox

// The products of the low halves of lanes.
inline Lanes multiply_low_halves(Lanes a, uint32_t b) {
  const Lanes factor = Lanes{} + b;
#if defined(__AVX512F__)
  return (Lanes)_mm512_mul_epu32((__m512i)a, (__m512i)factor);
#elif defined(__AVX2__)
  return (Lanes)_mm256_mul_epu32((__m256i)a, (__m256i)factor);
#elif defined(__x86_64__)
  return (Lanes)_mm_mul_epu32((__m128i)a, (__m128i)factor);
#else
  return (a & 0xffffffffu) * factor;
#endif
}

// Philox-4x32-10 on the low halves of lanes: philox4x32_10 with c1, c2, c3 common to all. High halves hold anything.
struct LaneWords {
  Lanes w[4];
};

inline __attribute__((always_inline)) LaneWords philox_lanes(Lanes quad, uint32_t draw, uint64_t sample_id, PhiloxKey key) {
  Lanes c0 = quad, c1 = Lanes{} + draw, c2 = Lanes{} + (sample_id & 0xffffffffu), c3 = Lanes{} + (sample_id >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const Lanes p0 = multiply_low_halves(c0, kPhiloxM0);
    const Lanes p1 = multiply_low_halves(c2, kPhiloxM1);
    c0 = (p1 >> 32) ^ (c1 ^ key.k0);
    c1 = p1;
    c2 = (p0 >> 32) ^ (c3 ^ key.k1);
    c3 = p0;
    key.k0 += kPhiloxW0;
    key.k1 += kPhiloxW1;
  }
  return {{c0, c1, c2, c3}};
}

// Word k of quad[i] into w[k][i], i < n rounded up to kStep. Two neighbouring quads are the halves of one lane in memory.
inline void stage_words(const uint32_t* quad, int n, PhiloxKey key, uint32_t draw, uint64_t sample_id,
                        uint32_t (*w)[kStage]) {
  for (int i = 0; i < n; i += kStep) {
    Lanes pairs;
    std::memcpy(&pairs, quad + i, sizeof pairs);
    const LaneWords even = philox_lanes(pairs, draw, sample_id, key);
    const LaneWords odd = philox_lanes(pairs >> 32, draw, sample_id, key);
    for (int k = 0; k < 4; ++k) {
      const Lanes both = (even.w[k] & 0xffffffffu) | (odd.w[k] << 32);
      std::memcpy(w[k] + i, &both, sizeof both);
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
    float z0, z1;
    box_muller((lane & 2) != 0 ? w[2][i] : w[0][i], (lane & 2) != 0 ? w[3][i] : w[1][i], z0, z1);
    return (lane & 1) != 0 ? z1 : z0;
  }
};

struct Uniforms {
  static void stage(const uint32_t (*w)[kStage], int n, float (*u)[kStage]) {
    for (int k = 0; k < 4; ++k)
      for (int i = 0; i < n; ++i) u[k][i] = uniform(w[k][i]);
  }

  static GENKERN_HD float pick(const uint32_t (*w)[kStage], int i, uint32_t lane) {
    const uint32_t low = (lane & 1) != 0 ? w[1][i] : w[0][i];
    const uint32_t high = (lane & 1) != 0 ? w[3][i] : w[2][i];
    return uniform((lane & 2) != 0 ? high : low);
  }
};

inline int whole_steps(int n) { return (n + kStep - 1) / kStep * kStep; }

template <typename Numbers>
void fill(float* to, uint64_t first_quad, int quads, PhiloxKey key, uint32_t draw, uint64_t sample_id) {
  alignas(64) uint32_t quad[kStage], words[4][kStage];
  alignas(64) float numbers[4][kStage];
  for (int q = 0; q < quads; q += kStage) {
    const int n = quads - q < kStage ? quads - q : kStage, steps = whole_steps(n);
    const uint32_t first = static_cast<uint32_t>(first_quad) + static_cast<uint32_t>(q);
    for (int i = 0; i < steps; ++i) quad[i] = first + static_cast<uint32_t>(i);
    stage_words(quad, steps, key, draw, sample_id, words);
    Numbers::stage(words, steps, numbers);
    float* block = to + 4 * static_cast<int64_t>(q);
    for (int i = 0; i < n; ++i) {
      block[4 * i] = numbers[0][i];
      block[4 * i + 1] = numbers[1][i];
      block[4 * i + 2] = numbers[2][i];
      block[4 * i + 3] = numbers[3][i];
    }
  }
}

template <typename Numbers>
void fill_at(float* to, const uint64_t* index, int count, PhiloxKey key, uint32_t draw, uint64_t sample_id) {
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
inline void fill_normals(float* z, uint64_t first_quad, int quads, PhiloxKey key, uint32_t draw, uint64_t sample_id) {
  fill<Normals>(z, first_quad, quads, key, draw, sample_id);
}

inline void fill_uniforms(float* u, uint64_t first_quad, int quads, PhiloxKey key, uint32_t draw, uint64_t sample_id) {
  fill<Uniforms>(u, first_quad, quads, key, draw, sample_id);
}

// Standard normals of the elements index[0 .. count - 1] of a sample.
inline void normals_at(float* z, const uint64_t* index, int count, PhiloxKey key, uint32_t draw, uint64_t sample_id) {
  fill_at<Normals>(z, index, count, key, draw, sample_id);
}

inline void uniforms_at(float* u, const uint64_t* index, int count, PhiloxKey key, uint32_t draw, uint64_t sample_id) {
  fill_at<Uniforms>(u, index, count, key, draw, sample_id);
}

}  // namespace
}  // namespace GENKERN_ISA
}  // namespace genkern
