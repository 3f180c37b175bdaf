// The row of a sample, and the order of the arithmetic that applies it.
//
//   m     = fma(w, m_c - m_u, m_u)
//   y     = fma(b, m, a x), then y < lo ? lo : (y > hi ? hi : y)
//   r_j   = the first given term as a product, then fma(c, term, acc), in the order y, x, m, h0, h1, h2, e z
//   e z   = e times z, e = exp(fma(l1, v, l0)) by exp.h; z itself where no v is given
//   k_j   = p_j known, then fma(q_j, z, k_j) where there is noise
//   out_j = r_j where the mask is 0, k_j where it is 1, else fma(mask, k_j - r_j, r_j)
//
// Every path (CUDA, and each instruction set of the CPU) follows this order, so map has the same bits on all of them.
#pragma once

#include "kernels.h"
#include "platform.h"

namespace genkern {
namespace {

GENKERN_HD constexpr int size_of(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : dtype == DType::u8 ? 1 : 2;
}

GENKERN_HD double read_value(const Value& v, int64_t b) {
  const int64_t i = b * v.stride;
  const double value = v.dtype == DType::f64 ? static_cast<const double*>(v.data)[i]
                                             : static_cast<double>(static_cast<const float*>(v.data)[i]);
  return v.scale * value;
}

// 1 where there is none.
GENKERN_HD double weight_of(const Value& v, int64_t b) { return v.data != nullptr ? read_value(v, b) : 1.0; }

// Eq. (13.13) with d = eta (sigma_s / sigma_t) sqrt(1 - alpha_t^2 / alpha_s^2), the seed's sigma_t at eta = 1:
//
//   x_s = alpha_s y + sqrt(sigma_s^2 - d^2) epsilon + d z,    epsilon from the network's output, unclamped.
//
// A variance made negative by rounding is 0. Without use_pred, y is folded into x and m.
template <typename Acc>
GENKERN_HD void ddim_cells(Formula formula, const double* path, bool use_pred, Acc* cells) {
  const double alpha_t = path[0], sigma_t = path[1], alpha_s = path[2], sigma_s = path[3], eta = path[4];
  double d = 0.0;
  if (eta != 0.0) {
    const double ratio = alpha_t / alpha_s;
    const double kept = 1.0 - ratio * ratio;
    d = eta * (sigma_s / sigma_t) * sqrt_(kept > 0.0 ? kept : 0.0);
  }
  const double rest = sigma_s * sigma_s - d * d;
  const double e = sqrt_(rest > 0.0 ? rest : 0.0);
  double a, b, ex, em;  // y = a x + b m; epsilon = ex x + em m
  if (formula == Formula::ddim_epsilon) {
    a = 1.0 / alpha_t, b = -sigma_t / alpha_t, ex = 0.0, em = 1.0;
  } else if (formula == Formula::ddim_v) {
    a = alpha_t, b = -sigma_t, ex = sigma_t, em = alpha_t;
  } else {
    a = 0.0, b = 1.0, ex = 1.0 / sigma_t, em = -alpha_t / sigma_t;
  }
  Acc* out = cells + kFirstOut;
  cells[kA] = static_cast<Acc>(a);
  cells[kB] = static_cast<Acc>(b);
  out[kOutY] = static_cast<Acc>(use_pred ? alpha_s : 0.0);
  out[kOutX] = static_cast<Acc>(use_pred ? e * ex : e * ex + alpha_s * a);
  out[kOutM] = static_cast<Acc>(use_pred ? e * em : e * em + alpha_s * b);
  out[kOutZ] = static_cast<Acc>(d);
}

// The cells of sample b that a named formula computes, from its path values.
template <typename Acc>
GENKERN_HD void formula_cells(const RowSource& source, int64_t b, bool use_pred, Acc* cells) {
  double path[kPathCells];
  for (int p = 0; p < kPathCells; ++p) path[p] = source.base[kMaxCells + p];
  for (int k = 0; k < source.n_values; ++k) {
    const int cell = source.values[k].cell;
    const double value = cell < kMaxCells ? 0.0 : read_value(source.values[k], b);
    // Unrolled compares instead of path[cell - kMaxCells]: a run-time index would put path in local memory.
    for (int p = 0; p < kPathCells; ++p)
      if (cell == kMaxCells + p) path[p] = value;
  }
  ddim_cells(source.formula, path, use_pred, cells);
}

// The cells of sample b's row. cells holds at least source.n_cells numbers.
template <typename Acc>
GENKERN_HD void load_row(const RowSource& source, int64_t b, bool use_pred, Acc* cells) {
  if (source.table != nullptr) {
    const int64_t r = source.index != nullptr ? source.index[b * source.index_stride] : b;
    const bool inside = source.index == nullptr || (r >= 0 && r < source.table_rows);
    const Acc* row = static_cast<const Acc*>(source.table) + (inside ? r * source.table_stride : 0);
    for (int c = 0; c < source.n_cells; ++c) cells[c] = inside ? row[c] : static_cast<Acc>(NAN);
    return;
  }
  for (int c = 0; c < source.n_cells; ++c) cells[c] = static_cast<Acc>(source.base[c]);
  for (int k = 0; k < source.n_values; ++k) {
    const int cell = source.values[k].cell;
    if (cell < kMaxCells || cell >= kAllCells) cells[cell] = static_cast<Acc>(read_value(source.values[k], b));
  }
  if (source.formula != Formula::none) formula_cells(source, b, use_pred, cells);
}

template <typename Acc>
GENKERN_HD Acc clamp(Acc y, Acc lo, Acc hi) {
  return y < lo ? lo : (y > hi ? hi : y);  // NaN stays NaN
}

// r and k by the mask: selected at 0 and 1, so that the one not asked for may be NaN.
template <typename Acc>
GENKERN_HD Acc blend(Acc r, Acc k, Acc mask) {
  return mask == Acc(0) ? r : mask == Acc(1) ? k : fma_(mask, k - r, r);
}

}  // namespace
}  // namespace genkern
