// The noise of csrc/kernels as a C library, for tests/native_noise.py: compiled once for each instruction set, as the
// kernels are, with GENKERN_ISA naming it.
#include "noise_block.h"

using namespace genkern;
using namespace genkern::GENKERN_ISA;

extern "C" {

void philox(const uint32_t* counter, const uint32_t* key, uint32_t* words) {
  const Words4 four = philox4x32_10(counter[0], counter[1], counter[2], counter[3], PhiloxKey{key[0], key[1]});
  for (int k = 0; k < 4; ++k) words[k] = four.w[k];
}

uint64_t mix(uint64_t x) { return mix64(x); }

// The pair of Box-Muller of each pair of words.
void pairs(const uint32_t* w0, const uint32_t* w1, int n, float* z0, float* z1) {
  for (int i = 0; i < n; ++i) box_muller(w0[i], w1[i], z0[i], z1[i]);
}

void uniform_of(const uint32_t* w, int n, float* u) {
  for (int i = 0; i < n; ++i) u[i] = uniform(w[i]);
}

// One quad after another through normal4, as a CUDA thread draws them.
void normals_by_quad(float* z, uint64_t first_quad, int quads, uint64_t seed, uint64_t stream, uint32_t draw,
                     uint64_t id) {
  for (int q = 0; q < quads; ++q) {
    const uint32_t quad = static_cast<uint32_t>(first_quad) + static_cast<uint32_t>(q);
    const Floats4 four = normal4(sample_words(quad, draw, id, philox_key(seed, stream)));
    for (int k = 0; k < 4; ++k) z[4 * static_cast<int64_t>(q) + k] = four.v[k];
  }
}

void uniforms_by_quad(float* u, uint64_t first_quad, int quads, uint64_t seed, uint64_t stream, uint32_t draw,
                      uint64_t id) {
  for (int q = 0; q < quads; ++q) {
    const uint32_t quad = static_cast<uint32_t>(first_quad) + static_cast<uint32_t>(q);
    const Floats4 four = uniform4(sample_words(quad, draw, id, philox_key(seed, stream)));
    for (int k = 0; k < 4; ++k) u[4 * static_cast<int64_t>(q) + k] = four.v[k];
  }
}

void normals(float* z, uint64_t first_quad, int quads, uint64_t seed, uint64_t stream, uint32_t draw, uint64_t id) {
  fill_normals(z, first_quad, quads, philox_key(seed, stream), draw, id);
}

void uniforms(float* u, uint64_t first_quad, int quads, uint64_t seed, uint64_t stream, uint32_t draw, uint64_t id) {
  fill_uniforms(u, first_quad, quads, philox_key(seed, stream), draw, id);
}

void normals_of(float* z, const uint64_t* index, int n, uint64_t seed, uint64_t stream, uint32_t draw, uint64_t id) {
  normals_at(z, index, n, philox_key(seed, stream), draw, id);
}

void uniforms_of(float* u, const uint64_t* index, int n, uint64_t seed, uint64_t stream, uint32_t draw, uint64_t id) {
  uniforms_at(u, index, n, philox_key(seed, stream), draw, id);
}
}
