// The functions that the faces call, and their arguments: raw pointers, sizes, strides.
//
//   m     = m_u + w (m_c - m_u)
//   y     = clamp(a x + b m, lo, hi)
//   r_j   = c0j y + c1j x + c2j m + sum_k c3jk h_k + s_j e z,    e = exp(l0 + l1 v), 1 without v
//   out_j = r_j + mask (p_j known + q_j z - r_j)                 where the output is blended, else r_j
//
// map applies a row of coefficients; reduce applies one with one output, the residual r, writes
// scale * weight[b] * mask * r (with sign(r) for absolute values), times m's coefficient where asked for, sums
// mask * rho(r) over each sample, and those over the batch.
#pragma once

#include <cstddef>
#include <cstdint>

namespace genkern {

enum class DType : int32_t { f32 = 0, f16 = 1, bf16 = 2, f64 = 3, u8 = 4 };

constexpr int kMaxDims = 16;  // of a tensor, the batch included
constexpr int kMaxH = 3;
constexpr int kMaxOuts = 3;
constexpr int kMaxValues = 12;  // coefficients that vary by sample

// The inputs of a pass, in the order in which its terms are added, and those of its elementwise coefficients: map's
// mask weighs what is known, reduce's the residual.
enum Input { kX, kM, kMUncond, kH0, kH1, kH2, kZ, kMask, kV, kKnownData, kInputs };

// Cells of a row: 5 + 7 an output; path values of a named formula follow at 26, elementwise coefficients at 31. A row
// of v or known has all 39.
enum Cell { kA, kB, kLo, kHi, kW, kFirstOut };
enum OutCell { kOutY, kOutX, kOutM, kOutH0, kOutH1, kOutH2, kOutZ, kOutCells };
constexpr int kMaxCells = kFirstOut + kOutCells * kMaxOuts;
constexpr int kPathCells = 5;  // alpha_t, sigma_t, alpha_s, sigma_s, eta
constexpr int kAllCells = kMaxCells + kPathCells;
enum ElementwiseCell { kL0 = kAllCells, kL1, kFirstKnown };
enum KnownCell { kP, kQ, kKnownCells };
constexpr int kRowCells = kFirstKnown + kKnownCells * kMaxOuts;

enum class Formula : int32_t { none = 0, ddim_epsilon = 1, ddim_v = 2, ddim_sample = 3 };
enum class Draw : int32_t { none = 0, normal = 1, uniform = 2 };
enum class Rho : int32_t { square = 0, absolute = 1 };

// data is null where the term is not given. strides: in elements, one a dimension, the batch first.
struct Array {
  void* data = nullptr;
  DType dtype = DType::f32;
  const int64_t* strides = nullptr;
};

// A number for each sample: data[b * stride], stride 0 for one number for all.
struct Value {
  const void* data;
  DType dtype;
  int64_t stride;
  int32_t cell;
  double scale;
};

struct NoiseSource {
  Draw draw_kind = Draw::none;
  uint64_t seed = 0, stream = 0;
  uint32_t draw = 0;
  const int64_t* device_key = nullptr;  // seed, stream, offset of draw; read by the kernel
  const int64_t* sample_ids = nullptr;  // null: 0 .. B-1
};

// Where the row of sample b comes from: the table, or the base cells with the values over them, then the formula.
struct RowSource {
  int32_t n_cells = 0;
  double base[kRowCells] = {};
  const void* table = nullptr;  // [rows, n_cells] of the arithmetic's type
  int64_t table_stride = 0;     // in elements; 0 where one row serves every sample and no index is given
  int64_t table_rows = 0;       // an index outside gives a row of NaN
  const int64_t* index = nullptr;
  int64_t index_stride = 0;
  int32_t n_values = 0;
  Value values[kMaxValues];
  Formula formula = Formula::none;

  bool by_sample() const { return table != nullptr || n_values > 0 || formula != Formula::none; }

  // Whether samples may have different rows: not where one line of a table, or values of one element, serve all.
  bool differs() const {
    if (table != nullptr) return (index != nullptr ? index_stride : table_stride) != 0;
    for (int32_t k = 0; k < n_values; ++k)
      if (values[k].stride != 0) return true;
    return false;
  }
};

struct MapArgs {
  int32_t ndim = 0;  // the batch included
  int64_t sizes[kMaxDims];
  Array in[kInputs];
  Array out[kMaxOuts];
  int32_t n_out = 1;
  bool use_pred = false;
  bool f64 = false;      // arithmetic in double
  uint32_t blended = 0;  // by output: whether known is put into it
  NoiseSource noise;
  RowSource rows;

  bool elementwise() const { return in[kV].data != nullptr || in[kKnownData].data != nullptr; }

  // Whether x is scaled where it lies, by numbers of samples: a gradient, mostly by 1, where there is nothing to do.
  bool scales_in_place() const {
    for (int k = 0; k < kInputs; ++k)
      if ((in[k].data != nullptr) != (k == kX)) return false;
    const bool one = rows.by_sample() && n_out == 1 && !use_pred && noise.draw_kind == Draw::none;
    return one && in[kX].data == out[0].data && in[kX].dtype == out[0].dtype;
  }
};

// The written residual times scale * weight[b], and m's coefficient, is the gradient of a loss already.
struct ReduceArgs {
  MapArgs map;  // one output: the residual; not written where its data is null
  Rho rho = Rho::square;
  double scale = 1.0;
  Value weight{nullptr, DType::f32, 0, 0, 1.0};  // of a sample; null: 1
  bool by_m = false;                             // m's coefficient is in what is written
  void* sums = nullptr;  // [B, 2] of the arithmetic's type: sum of mask * rho, sum of the mask (n without one); or null
  void* total = nullptr;  // of the arithmetic's type: total_scale times the sum of weight[b] * sums[b][0]; or null
  double total_scale = 1.0;
  void* workspace = nullptr;  // reduce_workspace() bytes
};

// How a face runs a loop on its threads: body(context, begin, end) over pieces of [0, count).
struct Parallel {
  void (*run)(int64_t count, int64_t grain, void* context, void (*body)(void*, int64_t, int64_t));
};

void map_cpu(const MapArgs& args, const Parallel& parallel);
void reduce_cpu(const ReduceArgs& args, const Parallel& parallel);
size_t reduce_workspace_cpu(const MapArgs& args);

// The instruction set in use: "scalar", "avx2", "avx512". select_isa is for tests; false where the CPU lacks it.
const char* cpu_isa();
bool select_cpu_isa(const char* name);

// stream: a cudaStream_t. Null, or what the CUDA runtime said was wrong with the launch.
const char* map_cuda(const MapArgs& args, void* stream);
const char* reduce_cuda(const ReduceArgs& args, void* stream);
size_t reduce_workspace_cuda(const MapArgs& args);

}  // namespace genkern
