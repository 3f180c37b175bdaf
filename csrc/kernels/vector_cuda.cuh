// One thread's elements: fetched, the row applied, written.
#pragma once

#include <type_traits>

#include "bytes_cuda.cuh"
#include "exp.h"
#include "pass_cuda.cuh"

namespace genkern {
namespace {

// How elements lie. linear: every array and the noise's index in one order. permuted: every array in one order, the
// index in another (channels_last). strided: anything.
enum class Layout { linear, permuted, strided };

// The address of element e of sample b, in array k.
template <typename Acc>
__device__ __forceinline__ char* address(const Pass<Acc>& pass, int k, int size, int64_t b, int64_t e) {
  return static_cast<char*>(pass.data[k]) + (b * pass.batch_stride[k] + e) * size;
}

// Where element e lies in every array of a strided walk: one division a dimension for all of them, of 32 bits where
// that is enough.
struct Offsets {
  int64_t of[kArrays];

  template <typename Integer, typename Acc>
  __device__ __forceinline__ void set(const StridedPass<Acc>& pass, int64_t b, Integer e) {
#pragma unroll
    for (int k = 0; k < kArrays; ++k) of[k] = b * pass.batch_stride[k];
    for (int d = pass.ndim - 1; d >= 0; --d) {
      const auto size = static_cast<Integer>(pass.sizes[d]);
      const Integer rest = d > 0 ? e / size : 0;
      const auto at = static_cast<int64_t>(e - rest * size);
#pragma unroll
      for (int k = 0; k < kArrays; ++k) of[k] += at * pass.strides[k][d];
      e = rest;
    }
  }
};

struct Nothing {};

// A pass's cells where they lie: in the row of this thread's sample, or among the pass's own.
template <typename Acc>
struct Lying {
  const Acc *row, *own;
  uint64_t in_row;

  template <typename Facts, typename P, typename S>
  __device__ __forceinline__ Lying(Facts, const P& pass, const S& shared)
      : row(shared.rows[RowPlace(pass.rows).place]), in_row(pass.in_row) {
    if constexpr (Facts::kElementwise) {
      own = pass.row;
    } else {
      own = pass.cells;
    }
  }
  __device__ __forceinline__ Acc operator[](int k) const { return (in_row >> k & 1u) != 0 ? row[k] : own[k]; }
};

// The numbers of a sample where they stand, by cell, or 1: a thread asks for all that it uses, beside its vectors,
// before it scales the first of them by the pass's own cell. Through shared memory a warp would wait three times in the
// same queue, to load, to store and to load again.
template <typename Acc>
struct Direct {
  const float* const* numbers;
  uint64_t along;
  int64_t b;

  __device__ __forceinline__ Acc operator[](int k) const {
    const float* const number = numbers[k];
    return number != nullptr ? static_cast<Acc>(number[(along >> k & 1u) != 0 ? b : 0]) : Acc(1);
  }
};

template <typename Acc>
struct Products {
  const Acc *a, *b;

  __device__ __forceinline__ Acc operator[](int k) const { return a[k] * b[k]; }
};

// The cells that a known pass uses, in registers.
template <typename Acc, typename Facts, bool kCopied = Facts::kCopied>
struct Cells {
  Acc c[Facts::kElementwise ? kRowCells : kMaxCells];

  template <typename P, typename S>
  __device__ __forceinline__ Cells(const P& pass, const S& shared, int64_t b) {
    const Lying<Acc> lying(Facts(), pass, shared);
    if constexpr (std::is_base_of_v<LinearPass<Acc>, P>) {
      if (pass.direct) {
        copy(pass, Direct<Acc>{pass.numbers, pass.along, b < pass.batch ? b : 0});
        copy(pass, Products<Acc>{lying.own, c});
        return;
      }
    }
    pass.by_sample ? copy(pass, lying) : copy(pass, lying.own);
  }
  template <typename P, typename From>
  __device__ __forceinline__ void copy(const P& pass, const From& from) {
    if (Facts::use_pred(pass)) c[kA] = from[kA], c[kB] = from[kB], c[kLo] = from[kLo], c[kHi] = from[kHi];
    if (Facts::has(pass, kMUncond)) c[kW] = from[kW];
#pragma unroll
    for (int j = 0; j < Facts::kOuts; ++j) {
      const int first = kFirstOut + kOutCells * j;
      if (Facts::use_pred(pass)) c[first + kOutY] = from[first + kOutY];
      if (Facts::has(pass, kX)) c[first + kOutX] = from[first + kOutX];
      if (Facts::has(pass, kM)) c[first + kOutM] = from[first + kOutM];
#pragma unroll
      for (int k = 0; k < Facts::kHs; ++k) c[first + kOutH0 + k] = from[first + kOutH0 + k];
      if (Facts::kDraw || Facts::has(pass, kZ)) c[first + kOutZ] = from[first + kOutZ];
      if (Facts::has(pass, kKnownData)) {
        const int of_known = kFirstKnown + kKnownCells * j;
        c[of_known + kP] = from[of_known + kP], c[of_known + kQ] = from[of_known + kQ];
      }
    }
    if (Facts::has(pass, kV)) c[kL0] = from[kL0], c[kL1] = from[kL1];
  }
  __device__ __forceinline__ Acc operator[](int k) const { return c[k]; }
};

// Those of any other pass.
template <typename Acc, typename Facts>
struct Cells<Acc, Facts, false> : Lying<Acc> {
  template <typename P, typename S>
  __device__ __forceinline__ Cells(const P& pass, const S& shared, int64_t) : Lying<Acc>(Facts(), pass, shared) {}
};

// kVec elements of sample b from e on, `count` of which exist.
template <typename Acc_, int kVec_, Layout kLayout_, typename Facts_>
struct Vector {
  using Acc = Acc_;
  using Facts = Facts_;
  static constexpr Layout kLayout = kLayout_;
  using Laid = std::conditional_t<kLayout == Layout::linear, LinearPass<Acc>, StridedPass<Acc>>;
  using Pass = std::conditional_t<Facts::kElementwise, ElementwisePass<Acc, Laid>, Laid>;
  using Shared = genkern::Shared<Acc, Facts::kElementwise ? kRowCells : kMaxCells,
                                 kLayout == Layout::permuted ? kThreads / kWarp : kMaxRows>;
  static constexpr int kVec = kVec_, kHs = Facts::kHs, kOuts = Facts::kOuts;
  // Of any pass with elementwise coefficients, two where the registers suffice for them.
  static constexpr int kBlocks = Facts::kElementwise && !Facts::kWhole && kVec == 4 && sizeof(Acc) == 4
                                     ? 2
                                     : Facts::blocks(kLayout == Layout::permuted);
  // Vectors of 8 are of halves only.
  static constexpr int kWords = kVec == 8 ? 4 : (kVec * sizeof(Acc) + 3) / 4;

  int64_t b, e;
  int count;
  std::conditional_t<kLayout == Layout::strided, Offsets, Nothing> offsets;
  Raw<kWords> x, m, u, h[kHs > 0 ? kHs : 1], z;
  Raw<(kWords > kVec ? kWords : kVec)> mask;  // of any type beside halves
  std::conditional_t<Facts::kElementwise, Raw<kWords>, Nothing> v, known;

  __device__ __forceinline__ bool whole(const Pass& pass, int k) const {
    return Facts::kWhole || (kLayout != Layout::strided && kVec > 1 && count == kVec && (pass.aligned >> k & 1u) != 0);
  }

  __device__ __forceinline__ char* at(const Pass& pass, int k, int size) const {
    if constexpr (kLayout == Layout::strided) {
      return static_cast<char*>(pass.data[k]) + offsets.of[k] * size;
    } else {
      return address<Acc>(pass, k, size, b, e);
    }
  }

  template <int kRawWords>
  __device__ __forceinline__ void fetch_one(const Pass& pass, int k, Raw<kRawWords>& raw) {
    if (!Facts::has(pass, k)) return;
    const int size = size_of(Facts::dtype(pass, k));
    load_bytes<kVec>(at(pass, k, size), size, whole(pass, k), count, raw);
  }

  // Elements from `element` to `end` at most, or whole vectors only.
  __device__ __forceinline__ void fetch(const Pass& pass, int64_t sample, int64_t element, int64_t end) {
    b = sample, e = element;
    const int64_t left = b < pass.batch ? end - e : 0;
    count = left <= 0 ? 0 : Facts::kWhole || left >= kVec ? kVec : static_cast<int>(left);
    if (count == 0) return;
    if constexpr (kLayout == Layout::strided) {
      if (pass.n >> 32 == 0) {
        offsets.set(pass, b, static_cast<uint32_t>(e));
      } else {
        offsets.set(pass, b, e);
      }
    }
    fetch_one(pass, kX, x);
    fetch_one(pass, kM, m);
    fetch_one(pass, kMUncond, u);
#pragma unroll
    for (int k = 0; k < kHs; ++k) fetch_one(pass, kH0 + k, h[k]);
    if constexpr (!Facts::kDraw) fetch_one(pass, kZ, z);
    fetch_one(pass, kMask, mask);
    if constexpr (Facts::kElementwise) {
      fetch_one(pass, kV, v);
      fetch_one(pass, kKnownData, known);
    }
  }

  // zs by e, where v is given.
  __device__ __forceinline__ void scale_noise(const Pass& pass, const Cells<Acc, Facts>& cells, Acc* zs) const {
    if (!Facts::has(pass, kV)) return;
    Acc vs[kVec];
    decode<Acc, kVec>(v, Facts::dtype(pass, kV), vs);
    const Acc l0 = cells[kL0], l1 = cells[kL1];
#pragma unroll
    for (int i = 0; i < kVec; ++i) zs[i] = exp_<OneNumber<Acc>>(fma_(l1, vs[i], l0)) * zs[i];
  }

  // The blended outputs by what is known.
  __device__ __forceinline__ void blend_known(const Pass& pass, const Cells<Acc, Facts>& cells, bool noise,
                                              const Acc* zs, Acc (*out)[kVec]) const {
    if (!Facts::has(pass, kKnownData)) return;
    Acc ks[kVec], ws[kVec];
    decode<Acc, kVec>(known, Facts::dtype(pass, kKnownData), ks);
    decode<Acc, kVec>(mask, Facts::dtype(pass, kMask), ws);
#pragma unroll
    for (int j = 0; j < kOuts; ++j) {
      if (j >= Facts::n_out(pass) || (pass.blended >> j & 1u) == 0) continue;
      const Acc p = cells[kFirstKnown + kKnownCells * j + kP], q = cells[kFirstKnown + kKnownCells * j + kQ];
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        const Acc k = p * ks[i];
        out[j][i] = blend(out[j][i], noise ? fma_(q, zs[i], k) : k, ws[i]);
      }
    }
  }

  // out[j][i], by the order of arithmetic of rows.h. draw(values): the noise of these elements.
  template <typename Draw>
  __device__ __forceinline__ void apply(const Pass& pass, const Cells<Acc, Facts>& cells, Draw draw,
                                        Acc (*out)[kVec]) const {
    // fma(c, term, -0) is the product c * term to the bit, so that no term need know whether it is the first.
#pragma unroll
    for (int j = 0; j < kOuts; ++j)
#pragma unroll
      for (int i = 0; i < kVec; ++i) out[j][i] = Acc(-0.0);
    auto add = [&](const Acc* term, int cell) {
#pragma unroll
      for (int j = 0; j < kOuts; ++j) {
        if (j >= Facts::n_out(pass)) break;
        const Acc c = cells[kFirstOut + kOutCells * j + cell];
#pragma unroll
        for (int i = 0; i < kVec; ++i) out[j][i] = fma_(c, term[i], out[j][i]);
      }
    };
    const bool has_x = Facts::has(pass, kX), has_m = Facts::has(pass, kM);
    Acc xs[kVec], ms[kVec];
    if (has_x) decode<Acc, kVec>(x, Facts::dtype(pass, kX), xs);
    if (has_m) decode<Acc, kVec>(m, Facts::dtype(pass, kM), ms);
    if (Facts::has(pass, kMUncond)) {
      Acc us[kVec];
      decode<Acc, kVec>(u, Facts::dtype(pass, kMUncond), us);
      const Acc w = cells[kW];
#pragma unroll
      for (int i = 0; i < kVec; ++i) ms[i] = fma_(w, ms[i] - us[i], us[i]);
    }
    if (Facts::use_pred(pass)) {
      const Acc a = cells[kA], p = cells[kB], lo = cells[kLo], hi = cells[kHi];
      Acc y[kVec];
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        y[i] = has_x ? a * xs[i] : Acc(-0.0);
        if (has_m) y[i] = fma_(p, ms[i], y[i]);
        y[i] = clamp(y[i], lo, hi);
      }
      add(y, kOutY);
    }
    if (has_x) add(xs, kOutX);
    if (has_m) add(ms, kOutM);
#pragma unroll
    for (int k = 0; k < kHs; ++k) {
      if (Facts::has(pass, kH0 + k)) {
        Acc hs[kVec];
        decode<Acc, kVec>(h[k], Facts::dtype(pass, kH0 + k), hs);
        add(hs, kOutH0 + k);
      }
    }
    if constexpr (Facts::kElementwise) {
      Acc zs[kVec], scaled[kVec];
      const bool noise = Facts::kDraw || Facts::has(pass, kZ);
      if constexpr (Facts::kDraw) {
        draw(zs);
      } else if (noise) {
        decode<Acc, kVec>(z, Facts::dtype(pass, kZ), zs);
      }
      if (noise) {
#pragma unroll
        for (int i = 0; i < kVec; ++i) scaled[i] = zs[i];
        scale_noise(pass, cells, scaled);
        add(scaled, kOutZ);
      }
      blend_known(pass, cells, noise, zs, out);
    } else if constexpr (Facts::kDraw) {
      Acc zs[kVec];
      draw(zs);
      add(zs, kOutZ);
    } else if (Facts::has(pass, kZ)) {
      Acc zs[kVec];
      decode<Acc, kVec>(z, Facts::dtype(pass, kZ), zs);
      add(zs, kOutZ);
    }
  }

  __device__ __forceinline__ void put(const Pass& pass, int j, const Acc* values) const {
    const int k = kInputs + j;
    const DType dtype = Facts::dtype(pass, k);
    store<Acc, kVec>(at(pass, k, size_of(dtype)), dtype, whole(pass, k), count, values);
  }
};

}  // namespace
}  // namespace genkern
