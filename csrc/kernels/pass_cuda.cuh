// A pass on the device: its arguments, how it is laid over blocks, and what the threads of a block share.
//
// A block is tx threads along a sample by ty samples. A thread takes kUnroll vectors of kVec elements, tx vectors
// apart: a chunk; a block takes the row for several chunks in turn.
#pragma once

#include <cuda_runtime.h>

#include "facts_cuda.cuh"
#include "layout.h"
#include "philox.h"
#include "rows.h"

namespace genkern {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr int kMaxRows = 64;  // samples a block
constexpr int kTile = 4096;   // elements of a permuted walk that a block takes at once
constexpr int kArrays = kInputs + kMaxOuts;

template <typename Acc>
struct Pass {
  void* data[kArrays];
  int64_t batch_stride[kArrays];
  DType dtype[kArrays];
  uint32_t given, aligned;  // bits, by array
  int64_t batch, n;
  int64_t blocks;  // along a sample
  int32_t chunks;  // a block; tiles of a permuted walk
  int32_t n_out;
  bool use_pred, by_sample;
  uint64_t in_row;       // bits, by cell: those that differ by sample; the others are in cells
  Acc cells[kMaxCells];  // the row of every sample
  bool direct;           // each thread reads its sample's row for itself
  NoiseSource noise;
  PhiloxRounds keys;  // of the noise, unless its key is in device memory
  RowSource rows;
};

// A pass whose walk is linear, and what a thread reads if its row is direct: by cell, a number a sample, or one for all
// of them, or null.
template <typename Acc>
struct LinearPass : Pass<Acc> {
  uint64_t along;  // bits, by cell: a number a sample
  const float* numbers[kRowCells];
};

// A pass whose walk is not linear.
template <typename Acc>
struct StridedPass : Pass<Acc> {
  int32_t ndim;
  int64_t sizes[kMaxDims];
  int64_t strides[kWalkArrays][kMaxDims];
  // A permuted walk: the dimension of index stride 1, the elements of the faster ones, how much of it is a tile, how
  // many tiles it has, and a sample has.
  int32_t quad, run, pixels;
  uint32_t tiles_along, tiles;
};

// A pass with elementwise coefficients.
template <typename Acc, typename Base>
struct ElementwisePass : Base {
  Acc row[kRowCells];  // in place of Base::cells
  uint32_t blended;
};

// What the threads of a block share: rows of samples, or one of each warp.
template <typename Acc, int kCells, int kRows>
struct Shared {
  Acc rows[kRows][kCells];
};

// Groups of blockDim.y samples lie along y and z of the grid (y alone ends at 65535).
__device__ __forceinline__ int64_t group_of_block() {
  return blockIdx.y + static_cast<int64_t>(gridDim.y) * blockIdx.z;
}

__device__ __forceinline__ int64_t sample_of_thread() { return group_of_block() * blockDim.y + threadIdx.y; }

// Where a thread finds its sample's row in shared memory: in its warp's own place, where a warp is of one sample, so
// that it waits for no other warp; else, and where a formula is evaluated once a block, in that of the sample.
struct RowPlace {
  bool of_warp;
  int place, first, step;  // this thread's part of filling it

  __device__ __forceinline__ explicit RowPlace(const RowSource& source) {
    of_warp = source.formula == Formula::none && blockDim.x >= kWarp;
    place = of_warp ? (threadIdx.y * blockDim.x + threadIdx.x) / kWarp : threadIdx.y;
    step = of_warp ? kWarp : blockDim.x;
    first = threadIdx.x % step;
  }
};

// The cells of sample b's row that Pass::in_row names, before a formula. All of them are read at once: a thread that
// went through the values one by one would wait for the memory as often.
template <typename Acc>
__device__ __forceinline__ void read_row(const RowSource& source, const RowPlace& place, int64_t b, Acc* cells) {
  if (source.table != nullptr) {
    const int64_t r = source.index != nullptr ? source.index[b * source.index_stride] : b;
    const bool inside = source.index == nullptr || (r >= 0 && r < source.table_rows);
    const Acc* row = static_cast<const Acc*>(source.table) + (inside ? r * source.table_stride : 0);
    for (int c = place.first; c < source.n_cells; c += place.step) cells[c] = inside ? row[c] : static_cast<Acc>(NAN);
    return;
  }
  for (int k = place.first; k < source.n_values; k += place.step) {
    const Value& value = source.values[k];
    if (value.cell < source.n_cells) cells[value.cell] = static_cast<Acc>(read_value(value, b));
  }
}

// Brings the rows of the block's samples into shared memory, unless threads read them for themselves. Every thread of
// the block calls it.
template <typename Acc, int kCells, int kRows>
__device__ __forceinline__ void share(const Pass<Acc>& pass, int64_t b, Shared<Acc, kCells, kRows>& shared) {
  if (!pass.by_sample || pass.direct) return;
  const RowPlace place(pass.rows);
  if (b < pass.batch) read_row(pass.rows, place, b, shared.rows[place.place]);
  if (pass.rows.formula != Formula::none) {
    __syncthreads();  // a formula's cells come over values
    if (place.first == 0 && b < pass.batch) formula_cells(pass.rows, b, pass.use_pred, shared.rows[place.place]);
  }
  if (place.of_warp) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

}  // namespace
}  // namespace genkern
