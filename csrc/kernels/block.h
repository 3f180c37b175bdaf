// A row applied to one block of a sample on the CPU: terms are brought into float (double) buffers that stay in the
// first cache, combined by one loop a row of N terms, and stored. Plain loops that the compiler vectorises for
// GENKERN_ISA.
#pragma once

#include <type_traits>

#include "half.h"
#include "isa.h"
#include "noise_block.h"
#include "rows.h"

namespace genkern {
namespace GENKERN_ISA {
namespace {

constexpr int kBlock = 512;
constexpr int kMaxTerms = 7;  // y, x, m, three h, z

// Where a block lies: elements [begin, begin + count) of sample b, in the walk's order.
struct Span {
  const Walk* walk;
  int64_t b, begin;
  int count;
};

// Calls body(offset, stride, at, count) for every run of the span along the fastest dimension.
template <typename Body>
void for_each_run(const Span& span, int k, Body body) {
  const Walk& walk = *span.walk;
  if (walk.linear) {  // without the divisions, which would cost as much as the arithmetic of a block
    body(span.b * walk.batch_stride[k] + span.begin, int64_t{1}, int64_t{0}, static_cast<int64_t>(span.count));
    return;
  }
  const int last = walk.ndim - 1;
  int64_t at = 0;
  while (at < span.count) {
    int64_t rest = span.begin + at;
    int64_t offset = span.b * walk.batch_stride[k];
    const int64_t inner = rest % walk.sizes[last];
    rest /= walk.sizes[last];
    for (int d = last - 1; d >= 0; --d) {
      offset += rest % walk.sizes[d] * walk.strides[k][d];
      rest /= walk.sizes[d];
    }
    const int64_t count = std::min(walk.sizes[last] - inner, span.count - at);
    body(offset + inner * walk.strides[k][last], walk.strides[k][last], at, count);
    at += count;
  }
}

// Elements of memory to a buffer, and back.
struct Plain {
  template <typename V>
  V operator()(V v) const {
    return v;
  }
};
struct FromBf16 {
  float operator()(uint16_t v) const { return bf16_to_float(v); }
};
struct FromHalf {
  float operator()(uint16_t v) const { return half_to_float(v); }
};
struct FromBool {
  int operator()(uint8_t v) const { return v != 0 ? 1 : 0; }
};
struct ToBf16 {
  uint16_t operator()(float v) const { return float_to_bf16(v); }
};
struct ToHalf {
  uint16_t operator()(float v) const { return float_to_half(v); }
};

template <typename From, typename Convert, typename To>
void gather(const Span& span, int k, const void* data, To* to) {
  const Convert convert;
  const From* from = static_cast<const From*>(data);
  for_each_run(span, k, [&](int64_t offset, int64_t stride, int64_t at, int64_t count) {
    const From* p = from + offset;
    To* q = to + at;
    if (stride != 1) {
      for (int64_t i = 0; i < count; ++i) q[i] = static_cast<To>(convert(p[i * stride]));
    } else if constexpr (std::is_same_v<Convert, FromHalf> && std::is_same_v<To, float>) {
      halves_to_floats(p, q, count);
    } else {
#pragma GCC ivdep
      for (int64_t i = 0; i < count; ++i) q[i] = static_cast<To>(convert(p[i]));
    }
  });
}

template <typename To, typename Convert, typename From>
void scatter(const Span& span, int k, const From* from, void* data) {
  const Convert convert;
  using Narrow = std::conditional_t<sizeof(To) == 2, float, To>;  // halves are converted from float
  To* to = static_cast<To*>(data);
  for_each_run(span, k, [&](int64_t offset, int64_t stride, int64_t at, int64_t count) {
    To* q = to + offset;
    const From* p = from + at;
    if (stride != 1) {
      for (int64_t i = 0; i < count; ++i) q[i * stride] = convert(static_cast<Narrow>(p[i]));
    } else if constexpr (std::is_same_v<Convert, ToHalf> && std::is_same_v<From, float>) {
      floats_to_halves(p, q, count);
    } else {
#pragma GCC ivdep
      for (int64_t i = 0; i < count; ++i) q[i] = convert(static_cast<Narrow>(p[i]));
    }
  });
}

template <typename Acc>
constexpr DType dtype_of() {
  return sizeof(Acc) == 8 ? DType::f64 : DType::f32;
}

// The element in memory at which a linear span starts.
inline int64_t linear_offset(const Span& span, int k) { return span.b * span.walk->batch_stride[k] + span.begin; }

// The block of array k as Acc: where it lies already, if it does, else in buffer.
template <typename Acc>
const Acc* load(const Span& span, int k, const Array& array, Acc* buffer) {
  if (span.walk->linear && array.dtype == dtype_of<Acc>())
    return static_cast<const Acc*>(array.data) + linear_offset(span, k);
  switch (array.dtype) {
    case DType::f32: gather<float, Plain>(span, k, array.data, buffer); break;
    case DType::f64: gather<double, Plain>(span, k, array.data, buffer); break;
    case DType::f16: gather<uint16_t, FromHalf>(span, k, array.data, buffer); break;
    case DType::bf16: gather<uint16_t, FromBf16>(span, k, array.data, buffer); break;
    case DType::u8: gather<uint8_t, FromBool>(span, k, array.data, buffer); break;
  }
  return buffer;
}

template <typename Acc>
void store(const Span& span, int k, const Array& array, const Acc* values) {
  switch (array.dtype) {
    case DType::f32: scatter<float, Plain>(span, k, values, array.data); break;
    case DType::f64: scatter<double, Plain>(span, k, values, array.data); break;
    case DType::f16: scatter<uint16_t, ToHalf>(span, k, values, array.data); break;
    case DType::bf16: scatter<uint16_t, ToBf16>(span, k, values, array.data); break;
    case DType::u8: break;  // never an output
  }
}

// An element as it lies in memory, where a row is applied without buffers between.
struct Bf16 {
  uint16_t bits;
};
inline float widen(Bf16 v) { return bf16_to_float(v.bits); }
inline float widen(float v) { return v; }
inline double widen(double v) { return v; }
inline void narrow(float v, Bf16& to) { to.bits = float_to_bf16(v); }
inline void narrow(float v, float& to) { to = v; }
inline void narrow(double v, double& to) { to = v; }

// acc = c0 t0, then acc = fma(ck, tk, acc). out may be one of the terms: element i is read before it is written.
template <int kTerms, typename Acc, typename Element>
void combine_terms(const Acc* c, const Element* const* terms, Element* out, int count) {
  Acc coefficient[kTerms];
  const Element* term[kTerms];
  for (int k = 0; k < kTerms; ++k) coefficient[k] = c[k], term[k] = terms[k];
#pragma GCC ivdep
  for (int i = 0; i < count; ++i) {
    Acc acc = coefficient[0] * widen(term[0][i]);
    for (int k = 1; k < kTerms; ++k) acc = fma_(coefficient[k], widen(term[k][i]), acc);
    narrow(acc, out[i]);
  }
}

template <typename Acc, typename Element>
void combine(int n_terms, const Acc* c, const Element* const* terms, Element* out, int count) {
  switch (n_terms) {
    case 1: return combine_terms<1>(c, terms, out, count);
    case 2: return combine_terms<2>(c, terms, out, count);
    case 3: return combine_terms<3>(c, terms, out, count);
    case 4: return combine_terms<4>(c, terms, out, count);
    case 5: return combine_terms<5>(c, terms, out, count);
    case 6: return combine_terms<6>(c, terms, out, count);
    case 7: return combine_terms<7>(c, terms, out, count);
    default: break;  // a row has a term: faces/call.h
  }
}

template <typename Acc>
struct Buffers {
  alignas(64) Acc in[kInputs][kBlock];
  alignas(64) Acc pred[kBlock];
  alignas(64) Acc out[kMaxOuts][kBlock];
  alignas(64) float noise[kBlock];
  uint64_t index[kBlock];
};

struct SampleNoise {
  Draw kind;
  PhiloxKey key;
  uint32_t draw;
  uint64_t sample_id;
};

inline SampleNoise sample_noise(const NoiseSource& source, int64_t b) {
  const int64_t* device = source.device_key;
  const uint64_t seed = device != nullptr ? static_cast<uint64_t>(device[0]) : source.seed;
  const uint64_t stream = device != nullptr ? static_cast<uint64_t>(device[1]) : source.stream;
  const uint32_t draw = source.draw + (device != nullptr ? static_cast<uint32_t>(device[2]) : 0u);
  const int64_t id = source.sample_ids != nullptr ? source.sample_ids[b] : b;
  return {source.draw_kind, philox_key(seed, stream), draw, static_cast<uint64_t>(id)};
}

// A linear span starts at a multiple of kBlock, so its quads are whole but for the last, which buffer has room for.
template <typename Acc>
const Acc* draw_noise(const Span& span, const SampleNoise& noise, Buffers<Acc>& buffers) {
  float* z = buffers.noise;
  if (span.walk->linear) {
    const auto fill = noise.kind == Draw::normal ? fill_normals : fill_uniforms;
    fill(z, static_cast<uint64_t>(span.begin) / 4, (span.count + 3) / 4, noise.key, noise.draw, noise.sample_id);
  } else {
    for_each_run(span, kIndex, [&](int64_t offset, int64_t stride, int64_t at, int64_t count) {
      for (int64_t i = 0; i < count; ++i) buffers.index[at + i] = static_cast<uint64_t>(offset + i * stride);
    });
    const auto pick = noise.kind == Draw::normal ? normals_at : uniforms_at;
    pick(z, buffers.index, span.count, noise.key, noise.draw, noise.sample_id);
  }
  if constexpr (sizeof(Acc) == sizeof(float)) {
    return z;
  } else {
    for (int i = 0; i < span.count; ++i) buffers.in[kZ][i] = z[i];
    return buffers.in[kZ];
  }
}

// The terms after y, in the order in which they are added, and their cells.
constexpr Input kOrder[kMaxTerms - 1] = {kX, kM, kH0, kH1, kH2, kZ};
constexpr OutCell kTermCell[kMaxTerms - 1] = {kOutX, kOutM, kOutH0, kOutH1, kOutH2, kOutZ};

// The row's outputs for one block, each in result[j]. The last pass writes where `direct` says, if it is not null.
template <typename Acc>
void apply_row(const MapArgs& args, const Span& span, const Acc* cells, const SampleNoise& noise, Buffers<Acc>& buffers,
               Acc* direct, const Acc** result) {
  const Acc* in[kInputs] = {};
  for (int k = 0; k < kMask; ++k)
    if (args.in[k].data != nullptr) in[k] = load(span, k, args.in[k], buffers.in[k]);
  if (noise.kind != Draw::none) in[kZ] = draw_noise(span, noise, buffers);
  const int count = span.count;

  if (in[kMUncond] != nullptr) {
    const Acc *c = in[kM], *u = in[kMUncond], w = cells[kW];
    Acc* guided = buffers.in[kM];
#pragma GCC ivdep
    for (int i = 0; i < count; ++i) guided[i] = fma_(w, c[i] - u[i], u[i]);
    in[kM] = guided;
  }
  if (args.use_pred) {
    Acc coefficients[2];
    const Acc* terms[2];
    int n = 0;
    if (in[kX] != nullptr) coefficients[n] = cells[kA], terms[n++] = in[kX];
    if (in[kM] != nullptr) coefficients[n] = cells[kB], terms[n++] = in[kM];
    combine(n, coefficients, terms, buffers.pred, count);
    const Acc lo = cells[kLo], hi = cells[kHi];
    for (int i = 0; i < count; ++i) buffers.pred[i] = clamp(buffers.pred[i], lo, hi);
  }
  for (int j = 0; j < args.n_out; ++j) {
    const Acc* c = cells + kFirstOut + kOutCells * j;
    Acc coefficients[kMaxTerms];
    const Acc* terms[kMaxTerms];
    int n = 0;
    if (args.use_pred) coefficients[n] = c[kOutY], terms[n++] = buffers.pred;
    for (int t = 0; t < kMaxTerms - 1; ++t)
      if (in[kOrder[t]] != nullptr) coefficients[n] = c[kTermCell[t]], terms[n++] = in[kOrder[t]];
    Acc* out = direct != nullptr && j == args.n_out - 1 ? direct : buffers.out[j];
    combine(n, coefficients, terms, out, count);
    result[j] = out;
  }
}

// Calls body(span, cells, noise) for every block of tasks [begin, end), in order.
template <typename Acc, typename Body>
void for_each_block(const MapArgs& args, const Walk& walk, int64_t begin, int64_t end, Body body) {
  const int64_t chunks = chunks_per_sample(walk.n);
  Acc cells[kMaxCells];
  SampleNoise noise{};
  int64_t loaded = -1;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / chunks;
    if (b != loaded) {
      load_row(args.rows, b, args.use_pred, cells);
      noise = sample_noise(args.noise, b);
      loaded = b;
    }
    const int64_t first = task % chunks * kChunk;
    const int64_t last = std::min(first + kChunk, walk.n);
    for (int64_t at = first; at < last; at += kBlock)
      body(task, Span{&walk, b, at, static_cast<int>(std::min<int64_t>(kBlock, last - at))}, cells, noise);
  }
}

}  // namespace
}  // namespace GENKERN_ISA
}  // namespace genkern
