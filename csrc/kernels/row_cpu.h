// A row applied to a stretch of a sample on the CPU, from memory to memory in registers.
//
// What is given is decided by branches, once for every kGroup vectors: they always go the same way, and cost less than
// what bounds the loop, memory. (Blocks of intermediate results between one plain loop a stage cost a third of the
// bandwidth in half precision: while they are computed, nothing is on its way from memory.)
#pragma once

#include "lanes.h"
#include "rows.h"

namespace genkern {
namespace GENKERN_ISA {
namespace {

constexpr int kGroup = 4;

// Bytes that a load fetches ahead of itself: 256 of float32, 512 of 16 bits, by measurement on an EPYC. At 2 KiB, and
// with the stores' lines fetched as well, passes take 1.05 to 1.2 times as long; with nothing fetched, those of 16 bits
// into new pages 1.1 times.
template <typename Element>
constexpr int kAhead = 1024 / static_cast<int>(sizeof(Element));

// An array from the stretch's first element on.
struct Operand {
  void* data;
  DType dtype;
};

// An output. streamed: its whole vectors go past the caches, data is aligned to them.
struct Target {
  void* data;
  DType dtype;
  bool streamed;
};

// Data is null where a term is not given. Without initialisers: one is made for every block, and string instructions,
// by which GCC clears and copies a structure, wait for every store before them.
template <typename Acc>
struct RowPass {
  Operand in[kMask];  // x, m, m_u, h0, h1, h2, z
  Target out[kMaxOuts];
  int n_out;
  bool use_pred;
  const Acc* cells;
};

// The same with elementwise coefficients. The mask is of the arithmetic's type.
template <typename Acc>
struct ElementwisePass : RowPass<Acc> {
  Operand v, known, mask;
  uint32_t blended;
};

template <typename Acc>
using Group = Vec<Acc>[kGroup];

// Asks for the lines of the group that begins kAhead bytes later.
template <typename Acc, typename Element>
GENKERN_HD void prefetch_group(const Element* at) {
  constexpr int kBytes = kGroup * kWidth<Acc> * static_cast<int>(sizeof(Element));
  for (int line = 0; line < kBytes; line += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(at) + kAhead<Element> + line);
}

template <typename Acc, typename Element, bool kFromMemory = true>
GENKERN_HD void load_group(const void* data, int64_t at, Group<Acc>& to) {
  const Element* from = static_cast<const Element*>(data) + at;
  if (kFromMemory) prefetch_group<Acc>(from);
  for (int v = 0; v < kGroup; ++v) to[v] = load_lanes<Acc>(from + v * kWidth<Acc>);
}

template <typename Acc, typename Element>
GENKERN_HD void store_group(const Group<Acc>& from, const Target& out, int64_t at) {
  Element* to = static_cast<Element*>(out.data) + at;
  if constexpr (std::is_same_v<Acc, Element>) {
    if (out.streamed) {
      for (int v = 0; v < kGroup; ++v) stream_lanes<Acc>(from[v], to + v * kWidth<Acc>);
      return;
    }
  }
  for (int v = 0; v < kGroup; ++v) store_lanes<Acc>(from[v], to + v * kWidth<Acc>);
}

// Every array has elements of one type, noise drawn into a buffer aside.
template <typename Acc, typename Element>
struct OneType {
  static GENKERN_HD void load(const Operand& from, int64_t at, Group<Acc>& to) {
    load_group<Acc, Element>(from.data, at, to);
  }
  static GENKERN_HD void load_noise(const Operand& from, int64_t at, Group<Acc>& to) {
    from.dtype == DType::f32 ? load_group<Acc, float, false>(from.data, at, to) : load(from, at, to);
  }
  static GENKERN_HD void store(const Group<Acc>& from, const Target& to, int64_t at) {
    store_group<Acc, Element>(from, to, at);
  }
};

template <typename Acc>
struct AnyType {
  static GENKERN_HD void load(const Operand& from, int64_t at, Group<Acc>& to) {
    switch (from.dtype) {
      case DType::f64: return load_group<Acc, double>(from.data, at, to);
      case DType::f16: return load_group<Acc, Half>(from.data, at, to);
      case DType::bf16: return load_group<Acc, Bf16>(from.data, at, to);
      default: return load_group<Acc, float>(from.data, at, to);  // u8 is a mask, never a term
    }
  }
  static GENKERN_HD void load_noise(const Operand& from, int64_t at, Group<Acc>& to) { load(from, at, to); }
  static GENKERN_HD void store(const Group<Acc>& from, const Target& to, int64_t at) {
    switch (to.dtype) {
      case DType::f32: return store_group<Acc, float>(from, to, at);
      case DType::f64: return store_group<Acc, double>(from, to, at);
      case DType::f16: return store_group<Acc, Half>(from, to, at);
      case DType::bf16: return store_group<Acc, Bf16>(from, to, at);
      case DType::u8: return;
    }
  }
};

// acc = c0 t0, then acc = fma(ck, tk, acc): the first as fma(c0, t0, -0), which is the product to the bit.
template <typename Acc>
struct Sum {
  Group<Acc> acc;

  GENKERN_HD Sum() {
    for (int v = 0; v < kGroup; ++v) acc[v] = -Vec<Acc>{};
  }
  GENKERN_HD void add(Acc c, const Group<Acc>& term) {
    const Vec<Acc> factor = splat(c);
    for (int v = 0; v < kGroup; ++v) acc[v] = fma_lanes(factor, term[v], acc[v]);
  }
};

// e z of a group: z times exp(l0 + l1 v).
template <typename Acc, typename Types>
GENKERN_HD void scale_noise(const ElementwisePass<Acc>& p, int64_t i, Group<Acc>& z) {
  Group<Acc> v;
  Types::load(p.v, i, v);
  const Vec<Acc> l0 = splat(p.cells[kL0]), l1 = splat(p.cells[kL1]);
  for (int k = 0; k < kGroup; ++k) z[k] = exp_<OneVector<Acc>>(fma_lanes(l1, v[k], l0)) * z[k];
}

// rows.h, blend, of output j; z is null where there is no noise.
template <typename Acc, typename Types>
GENKERN_HD void blend_group(const ElementwisePass<Acc>& p, int j, int64_t i, const Group<Acc>* z, Group<Acc>& r) {
  const Acc* c = p.cells + kFirstKnown + kKnownCells * j;
  const Vec<Acc> weight = splat(c[kP]), of_noise = splat(c[kQ]), zero = splat(Acc(0)), one = splat(Acc(1));
  Group<Acc> known, mask;
  Types::load(p.known, i, known);
  load_group<Acc, Acc, false>(p.mask.data, i, mask);
  for (int v = 0; v < kGroup; ++v) {
    Vec<Acc> k = weight * known[v];
    if (z != nullptr) k = fma_lanes(of_noise, (*z)[v], k);
    const Vec<Acc> between = fma_lanes(mask[v], k - r[v], r[v]), some = mask[v] == one ? k : between;
    r[v] = mask[v] == zero ? r[v] : some;
  }
}

// Elements [0, count), count a multiple of a group's. Every term of an element is read before an output of it is
// written: an output may be an input.
template <typename Acc, typename Types, bool kPred, bool kMany, typename P>
void apply_groups(const P& given, int64_t count) {
  const P p = given;  // so that no store can be taken to change it
  constexpr bool kElementwise = !std::is_same_v<P, RowPass<Acc>>;
  const Acc* cells = p.cells;
  constexpr int kStep = kGroup * kWidth<Acc>;
  for (int64_t i = 0; i < count; i += kStep) {
    Group<Acc> m, y;
    if (p.in[kM].data != nullptr) {
      Types::load(p.in[kM], i, m);
      if (p.in[kMUncond].data != nullptr) {
        Group<Acc> u;
        Types::load(p.in[kMUncond], i, u);
        const Vec<Acc> w = splat(cells[kW]);
        for (int v = 0; v < kGroup; ++v) m[v] = fma_lanes(w, m[v] - u[v], u[v]);
      }
    }
    if (kPred) {
      Sum<Acc> sum;
      if (p.in[kX].data != nullptr) {
        Group<Acc> x;
        Types::load(p.in[kX], i, x);
        sum.add(cells[kA], x);
      }
      if (p.in[kM].data != nullptr) sum.add(cells[kB], m);
      const Vec<Acc> lo = splat(cells[kLo]), hi = splat(cells[kHi]);
      for (int v = 0; v < kGroup; ++v) {
        const Vec<Acc> s = sum.acc[v], below = s > hi ? hi : s;  // rows.h, clamp
        y[v] = s < lo ? lo : below;
      }
    }
    [[maybe_unused]] Group<Acc> z, scaled;  // z and e z
    [[maybe_unused]] const bool noise = p.in[kZ].data != nullptr;
    if constexpr (kElementwise) {
      if (noise) {
        Types::load_noise(p.in[kZ], i, z);
        for (int v = 0; v < kGroup; ++v) scaled[v] = z[v];
        if (p.v.data != nullptr) scale_noise<Acc, Types>(p, i, scaled);
      }
    }
    Group<Acc> results[kMany ? kMaxOuts : 1];
    for (int j = 0; j < (kMany ? p.n_out : 1); ++j) {
      const Acc* c = cells + kFirstOut + kOutCells * j;
      Sum<Acc> sum;
      Group<Acc> term;
      if (kPred) sum.add(c[kOutY], y);
      if (p.in[kX].data != nullptr) Types::load(p.in[kX], i, term), sum.add(c[kOutX], term);
      if (p.in[kM].data != nullptr) sum.add(c[kOutM], m);
      for (int h = 0; h < kMaxH; ++h)
        if (p.in[kH0 + h].data != nullptr) Types::load(p.in[kH0 + h], i, term), sum.add(c[kOutH0 + h], term);
      if constexpr (kElementwise) {
        if (noise) sum.add(c[kOutZ], scaled);
        if ((p.blended >> j & 1u) != 0) blend_group<Acc, Types>(p, j, i, noise ? &z : nullptr, sum.acc);
      } else if (p.in[kZ].data != nullptr) {
        Types::load_noise(p.in[kZ], i, term), sum.add(c[kOutZ], term);
      }
      if (!kMany) {
        Types::store(sum.acc, p.out[0], i);
      } else {
        for (int v = 0; v < kGroup; ++v) results[j][v] = sum.acc[v];
      }
    }
    if (kMany)
      for (int j = 0; j < p.n_out; ++j) Types::store(results[j], p.out[j], i);
  }
}

template <typename Acc, typename Types>
void apply_shape(const RowPass<Acc>& p, int64_t count) {
  if (p.n_out > 1)
    return p.use_pred ? apply_groups<Acc, Types, true, true>(p, count)
                      : apply_groups<Acc, Types, false, true>(p, count);
  p.use_pred ? apply_groups<Acc, Types, true, false>(p, count) : apply_groups<Acc, Types, false, false>(p, count);
}

// The type that every array has, drawn noise aside; u8 where they differ.
template <typename Acc>
DType common_type(const RowPass<Acc>& p, bool drawn) {
  const DType dtype = p.out[0].dtype;
  for (int j = 1; j < p.n_out; ++j)
    if (p.out[j].dtype != dtype) return DType::u8;
  for (int k = 0; k < (drawn ? kZ : kMask); ++k)
    if (p.in[k].data != nullptr && p.in[k].dtype != dtype) return DType::u8;
  return dtype;
}

template <typename Acc>
void apply_whole(const RowPass<Acc>& p, bool drawn, int64_t count) {
  if constexpr (std::is_same_v<Acc, float>) {
    switch (common_type(p, drawn)) {
      case DType::f32: return apply_shape<Acc, OneType<Acc, float>>(p, count);
      case DType::f16: return apply_shape<Acc, OneType<Acc, Half>>(p, count);
      case DType::bf16: return apply_shape<Acc, OneType<Acc, Bf16>>(p, count);
      default: break;
    }
  }
  apply_shape<Acc, AnyType<Acc>>(p, count);
}

// Of any types: passes with elementwise coefficients are too few for loops of their own.
template <typename Acc>
void apply_whole(const ElementwisePass<Acc>& p, bool, int64_t count) {
  p.use_pred ? apply_groups<Acc, AnyType<Acc>, true, true>(p, count)
             : apply_groups<Acc, AnyType<Acc>, false, true>(p, count);
}

// Elements [begin, begin + count), fewer than a group, by way of buffers of one group.
template <typename Acc, typename P>
void apply_rest(const P& p, bool drawn, int64_t begin, size_t count) {
  constexpr int kStep = kGroup * kWidth<Acc>;
  constexpr bool kElementwise = !std::is_same_v<P, RowPass<Acc>>;
  alignas(64) char in[kElementwise ? kMask + 3 : kMask][kStep * sizeof(double)] = {},
                                                                out[kMaxOuts][kStep * sizeof(double)];
  P rest = p;
  const auto bring = [&](Operand& operand, char* buffer) {
    if (operand.data == nullptr) return;
    const int64_t size = size_of(operand.dtype);
    std::memcpy(buffer, static_cast<const char*>(operand.data) + begin * size, count * static_cast<size_t>(size));
    operand.data = buffer;
  };
  for (int k = 0; k < kMask; ++k) bring(rest.in[k], in[k]);
  if constexpr (kElementwise)
    bring(rest.v, in[kMask]), bring(rest.known, in[kMask + 1]), bring(rest.mask, in[kMask + 2]);
  for (int j = 0; j < p.n_out; ++j) rest.out[j].data = out[j], rest.out[j].streamed = false;
  apply_whole(rest, drawn, kStep);
  for (int j = 0; j < p.n_out; ++j) {
    const int64_t size = size_of(p.out[j].dtype);
    std::memcpy(static_cast<char*>(p.out[j].data) + begin * size, out[j], count * static_cast<size_t>(size));
  }
}

// Elements [0, count). drawn: z is a buffer of drawn noise.
template <typename Acc, typename P>
void apply(const P& p, bool drawn, int64_t count) {
  const int64_t rest = count % (kGroup * kWidth<Acc>), whole = count - rest;
  if (whole > 0) apply_whole(p, drawn, whole);
  if (rest > 0) apply_rest<Acc>(p, drawn, whole, static_cast<size_t>(rest));
}

}  // namespace
}  // namespace GENKERN_ISA
}  // namespace genkern
