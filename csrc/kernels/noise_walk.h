// A sample's noise in the order of a walk. One Philox call serves four neighbours in C order:
//
//   run        the walk is in C order: quad after quad
//   tiles      one dimension of length 4 p has index stride 1, and `inner` elements of the dimensions after it lie
//              between its neighbours in memory (channels_last: pixels, and the channels of one). A tile is four
//              pixels: a quad for each of the inner elements, whose four numbers go to the four pixels. All quads of
//              a row of pixels' first elements side by side, so no number is moved across lanes.
//   scattered  any other: a call an element
#pragma once

#include "isa.h"
#include "noise_block.h"

namespace genkern {
namespace GENKERN_ISA {
namespace {

constexpr int kBlock = 512;  // elements

// Whether element i of a sample lies at i in array k.
inline bool is_dense(const Walk& walk, int k) {
  int64_t stride = 1;
  for (int d = walk.ndim - 1; d >= 0; --d) {
    if (walk.strides[k][d] != stride) return false;
    stride *= walk.sizes[d];
  }
  return true;
}

// The offset in array k of place i of the dimensions before `end`.
inline int64_t offset_of(const Walk& walk, int k, int end, int64_t i) {
  int64_t offset = 0;
  for (int d = end - 1; d >= 0; --d) {
    offset += i % walk.sizes[d] * walk.strides[k][d];
    i /= walk.sizes[d];
  }
  return offset;
}

struct SampleNoise {
  Draw kind;
  PhiloxKey key;
  uint32_t draw;
  uint64_t sample_id;
};

struct NoiseTiles {
  int dim = -1;
  int64_t inner = 0;    // 0: no tiles
  int64_t at_once = 0;  // elements drawn at once, a multiple of a block: so many that cut tiles are few
};

struct NoiseBuffers {
  static constexpr int kMargin = 4 * kStage;  // a small tile that the ends cut is written whole
  alignas(64) float z[kMargin + kChunk + 2 * kMargin];
  uint32_t quads[kChunk];                    // of the inner elements in tile 0
  alignas(64) uint32_t first_quads[kStage];  // of the first few tiles' elements, where they are small
  uint64_t index[kBlock];
  bool listed = false;

  float* chunk() { return z + kMargin; }
};

inline NoiseTiles find_tiles(const Walk& walk) {
  int64_t inner = 1;
  for (int d = walk.ndim - 1; d >= 0 && inner <= kChunk; --d) {
    // The index strides of the other dimensions are multiples of this one's size, so that quads start where tiles do.
    if (walk.strides[kIndex][d] == 1) {
      if (walk.sizes[d] % 4 != 0) return {};
      const int64_t wanted = 64 * 4 * inner;
      return {d, inner, std::min((wanted + kBlock - 1) / kBlock * kBlock, kChunk)};
    }
    inner *= walk.sizes[d];
  }
  return {};
}

inline void list_quads(const Walk& walk, const NoiseTiles& tiles, NoiseBuffers& buffers) {
  Walk after;  // the dimensions after the tiles'
  after.ndim = walk.ndim - tiles.dim - 1;
  for (int d = 0; d < after.ndim; ++d) {
    after.sizes[d] = walk.sizes[tiles.dim + 1 + d];
    after.strides[kIndex][d] = walk.strides[kIndex][tiles.dim + 1 + d];
  }
  for (int64_t j = 0; j < tiles.inner; ++j)
    buffers.quads[j] = static_cast<uint32_t>(offset_of(after, kIndex, after.ndim, j) / 4);
  for (int64_t i = 0; tiles.inner <= kStage && i < kStage; ++i)
    buffers.first_quads[i] = buffers.quads[i % tiles.inner] + static_cast<uint32_t>(i / tiles.inner);
  buffers.listed = true;
}

// Numbers of quad[0 .. n - 1]: number k of quad i in numbers[k][i].
inline void stage_numbers(const SampleNoise& noise, const uint32_t* quad, int n, float (*numbers)[kStage]) {
  alignas(64) uint32_t words[4][kStage];
  stage_words(quad, whole_steps(n), noise.key, noise.draw, noise.sample_id, words);
  noise.kind == Draw::normal ? Normals::stage(words, whole_steps(n), numbers)
                             : Uniforms::stage(words, whole_steps(n), numbers);
}

// Rows of inner numbers to the pixels of `tiles` tiles, kFloats >= inner at a time: what is written past a row's end is
// written again by the next row.
template <int kFloats>
void spread(const float (*numbers)[kStage], int tiles, int inner, float* to) {
  for (int t = 0; t < tiles; ++t)
    for (int k = 0; k < 4; ++k) std::memcpy(to + (4 * t + k) * inner, numbers[k] + t * inner, sizeof(float) * kFloats);
}

// Tiles [first, last) of inner <= kStage elements, a few a stage. slab: where tile 0 begins.
inline void draw_small_tiles(const SampleNoise& noise, const uint32_t* first_quads, uint32_t base, int inner,
                             int64_t first, int64_t last, float* slab) {
  alignas(64) uint32_t quad[kStage];
  alignas(64) float numbers[5][kStage] = {};  // one more: spread reads past row 3
  const int64_t at_once = kStage / inner;
  for (int64_t tile = first; tile < last; tile += at_once) {
    const int tiles = static_cast<int>(std::min(at_once, last - tile));
    for (int i = 0; i < kStage; ++i) quad[i] = first_quads[i] + base + static_cast<uint32_t>(tile);
    stage_numbers(noise, quad, tiles * inner, numbers);
    float* to = slab + 4 * tile * inner;
    if (inner <= 4)
      spread<4>(numbers, tiles, inner, to);
    else if (inner <= 16)
      spread<16>(numbers, tiles, inner, to);
    else
      spread<kStage>(numbers, tiles, inner, to);
  }
}

// Tiles of any size, of which elements [begin, end) of the slab are written.
inline void draw_large_tiles(const SampleNoise& noise, const uint32_t* quads, uint32_t base, int64_t inner,
                             int64_t begin, int64_t end, float* slab) {
  alignas(64) uint32_t quad[kStage] = {};
  alignas(64) float numbers[4][kStage];
  for (int64_t tile = begin / (4 * inner); tile * 4 * inner < end; ++tile) {
    for (int64_t j = 0; j < inner; j += kStage) {
      const int64_t n = std::min<int64_t>(kStage, inner - j);
      int64_t from[4], to[4];  // what is wanted of each row
      bool wanted = false;
      for (int k = 0; k < 4; ++k) {
        const int64_t row = (4 * tile + k) * inner + j;
        from[k] = std::max(row, begin) - row, to[k] = std::min(row + n, end) - row;
        wanted = wanted || from[k] < to[k];
      }
      if (!wanted) continue;
      for (int64_t i = 0; i < n; ++i) quad[i] = base + static_cast<uint32_t>(tile) + quads[j + i];
      stage_numbers(noise, quad, static_cast<int>(n), numbers);
      for (int k = 0; k < 4; ++k)
        if (from[k] < to[k])
          std::memcpy(slab + (4 * tile + k) * inner + j + from[k], numbers[k] + from[k],
                      sizeof(float) * static_cast<size_t>(to[k] - from[k]));
    }
  }
}

// Elements [begin, begin + count) of the walk, count <= kChunk, to buffers.chunk().
inline void draw_tiles(const Walk& walk, const NoiseTiles& tiles, int64_t begin, int64_t count,
                       const SampleNoise& noise, NoiseBuffers& buffers) {
  if (!buffers.listed) list_quads(walk, tiles, buffers);
  const int64_t slab_size = walk.sizes[tiles.dim] * tiles.inner, tile = 4 * tiles.inner;
  for (int64_t at = 0; at < count;) {
    const int64_t slab = (begin + at) / slab_size, from = (begin + at) % slab_size;
    const int64_t to = std::min(slab_size, from + count - at);
    const auto base = static_cast<uint32_t>(offset_of(walk, kIndex, tiles.dim, slab) / 4);
    float* z = buffers.chunk() + (at - from);
    if (tiles.inner <= kStage)
      draw_small_tiles(noise, buffers.first_quads, base, static_cast<int>(tiles.inner), from / tile,
                       (to + tile - 1) / tile, z);
    else
      draw_large_tiles(noise, buffers.quads, base, tiles.inner, from, to, z);
    at += to - from;
  }
}

// Quads [first, first + count) of a sample.
inline void draw_quads(const SampleNoise& noise, uint64_t first, int count, float* to) {
  const auto fill = noise.kind == Draw::normal ? fill_normals : fill_uniforms;
  fill(to, first, count, noise.key, noise.draw, noise.sample_id);
}

// Elements [begin, begin + count) of the walk, count <= kBlock, to buffers.chunk(). begin is a multiple of kBlock.
inline void draw_run(const Walk& walk, bool c_order, int64_t begin, int count, const SampleNoise& noise,
                     NoiseBuffers& buffers) {
  if (c_order) return draw_quads(noise, static_cast<uint64_t>(begin) / 4, (count + 3) / 4, buffers.chunk());
  for (int i = 0; i < count; ++i)
    buffers.index[i] = static_cast<uint64_t>(offset_of(walk, kIndex, walk.ndim, begin + i));
  const auto pick = noise.kind == Draw::normal ? normals_at : uniforms_at;
  pick(buffers.chunk(), buffers.index, count, noise.key, noise.draw, noise.sample_id);
}

}  // namespace
}  // namespace GENKERN_ISA
}  // namespace genkern
