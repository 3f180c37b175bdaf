// A pass on the device: its arguments, how it is laid over blocks, and what the threads of a block share.
//
// A block is tx threads along a sample by ty samples. A thread takes kUnroll vectors of kVec elements, tx vectors
// apart: a chunk; a block takes the row, and the keys of the noise, for several chunks in turn.
#pragma once

#include <cuda_runtime.h>

#include "facts_cuda.cuh"
#include "layout.h"
#include "philox.h"
#include "rows.h"

namespace genkern {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxRows = 64;  // samples a block
constexpr int kTile = 2048;   // elements of a permuted walk that a block takes
constexpr int kArrays = kInputs + kMaxOuts;

template <typename Acc>
struct Pass {
  void* data[kArrays];
  int64_t batch_stride[kArrays];
  DType dtype[kArrays];
  uint32_t given, aligned;  // bits, by array
  int64_t batch, n;
  int64_t blocks;  // along a sample
  int32_t chunks;  // a block
  int32_t n_out;
  bool use_pred, by_sample;
  uint64_t by_value;     // bits, by cell: those of rows.values
  Acc cells[kMaxCells];  // the row of every sample, unless by_sample
  NoiseSource noise;
  PhiloxRounds keys;  // of the noise, where its key is not in device memory
  RowSource rows;
};

// A pass whose walk is not linear.
template <typename Acc>
struct StridedPass : Pass<Acc> {
  int32_t ndim;
  int64_t sizes[kMaxDims];
  int64_t strides[kWalkArrays][kMaxDims];
  // A permuted walk: the dimension of index stride 1, the elements of the faster ones, how much of it is a tile, and
  // how many tiles it has.
  int32_t quad, run, pixels;
  uint32_t tiles;
};

// A pass with elementwise coefficients.
template <typename Acc, typename Base>
struct ElementwisePass : Base {
  Acc row[kRowCells];  // in place of Base::cells
  uint32_t blended;
};

// What the threads of a block share.
template <typename Acc, int kCells>
struct Shared {
  Acc rows[kMaxRows][kCells];
  PhiloxRounds keys;
};

// This thread's sample: groups of blockDim.y samples along y and z of the grid (y alone ends at 65535).
__device__ __forceinline__ int64_t sample_of_thread() {
  const int64_t group = blockIdx.y + static_cast<int64_t>(gridDim.y) * blockIdx.z;
  return group * blockDim.y + threadIdx.y;
}

// The row of this thread's sample on its way into shared memory: a thread a cell of a table, or a value, so that all of
// them are read at once, before the block's vectors, which they would wait behind. Blocks of fewer threads along a
// sample than that read the others when the row is put.
template <typename Acc>
struct RowRead {
  const Acc* line = nullptr;  // of the table; null: none, or outside it
  Acc cell;
  Value value;
  uint64_t bits;

  __device__ __forceinline__ explicit RowRead(const Pass<Acc>& pass, int64_t b) {
    const RowSource& source = pass.rows;
    if (!pass.by_sample || b >= pass.batch) return;
    const int first = threadIdx.x;
    if (source.table != nullptr) {
      const int64_t r = source.index != nullptr ? source.index[b * source.index_stride] : b;
      if (source.index != nullptr && (r < 0 || r >= source.table_rows)) return;
      line = static_cast<const Acc*>(source.table) + r * source.table_stride;
      if (first < source.n_cells) cell = line[first];
    } else if (first < source.n_values) {
      value = source.values[first];
      bits = value_bits(value, b);
    }
  }

  // The cells, before a formula. Two threads never write one.
  __device__ __forceinline__ void put(const Pass<Acc>& pass, int64_t b, Acc* cells) const {
    const RowSource& source = pass.rows;
    if (b >= pass.batch) return;
    const int first = threadIdx.x, step = blockDim.x;
    if (source.table != nullptr) {
      for (int c = first; c < source.n_cells; c += step)
        cells[c] = line == nullptr ? static_cast<Acc>(NAN) : c == first ? cell : line[c];
      return;
    }
    for (int c = first; c < source.n_cells; c += step)
      if ((pass.by_value >> c & 1u) == 0) cells[c] = static_cast<Acc>(source.base[c]);
    if (first < source.n_values && value.cell < source.n_cells)
      cells[value.cell] = static_cast<Acc>(value_of(value, bits));
    for (int k = first + step; k < source.n_values; k += step)
      if (source.values[k].cell < source.n_cells)
        cells[source.values[k].cell] = static_cast<Acc>(read_value(source.values[k], b));
  }
};

// Brings into shared memory what is not among the pass's own numbers: the rows of the block's samples, and the keys of
// noise whose seed is in device memory. Every thread of the block calls it.
template <bool kDraw, typename Acc, int kCells>
__device__ __forceinline__ void share(const Pass<Acc>& pass, int64_t b, const RowRead<Acc>& row,
                                      Shared<Acc, kCells>& shared) {
  const int64_t* seed = kDraw ? pass.noise.device_key : nullptr;
  if (!pass.by_sample && seed == nullptr) return;
  if (pass.by_sample) {
    row.put(pass, b, shared.rows[threadIdx.y]);
    if (pass.rows.formula != Formula::none) {
      __syncthreads();
      if (threadIdx.x == 0 && b < pass.batch) formula_cells(pass.rows, b, pass.use_pred, shared.rows[threadIdx.y]);
    }
  }
  if (kDraw && seed != nullptr && threadIdx.x + threadIdx.y == 0)
    shared.keys = philox_rounds(philox_key(static_cast<uint64_t>(seed[0]), static_cast<uint64_t>(seed[1])));
  __syncthreads();
}

}  // namespace
}  // namespace genkern
