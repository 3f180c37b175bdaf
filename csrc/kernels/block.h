// A row applied to one block of a sample on the CPU: arrays that the walk meets in the order of memory are read and
// written where they lie (row_cpu.h), the others by way of buffers that stay in the first cache.
#pragma once

#include "noise_walk.h"
#include "row_cpu.h"

namespace genkern {
namespace GENKERN_ISA {
namespace {

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
  if (is_dense(walk, k))
    return body(span.b * walk.batch_stride[k] + span.begin, int64_t{1}, int64_t{0}, int64_t{span.count});
  const int last = walk.ndim - 1;
  for (int64_t at = 0; at < span.count;) {
    const int64_t inner = (span.begin + at) % walk.sizes[last];
    const int64_t offset = offset_of(walk, k, last, (span.begin + at) / walk.sizes[last]);
    const int64_t count = std::min(walk.sizes[last] - inner, span.count - at);
    body(span.b * walk.batch_stride[k] + offset + inner * walk.strides[k][last], walk.strides[k][last], at, count);
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

// The block of array k as Acc, in buffer.
template <typename Acc>
void load(const Span& span, int k, const Array& array, Acc* buffer) {
  switch (array.dtype) {
    case DType::f32: gather<float, Plain>(span, k, array.data, buffer); break;
    case DType::f64: gather<double, Plain>(span, k, array.data, buffer); break;
    case DType::f16: gather<uint16_t, FromHalf>(span, k, array.data, buffer); break;
    case DType::bf16: gather<uint16_t, FromBf16>(span, k, array.data, buffer); break;
    case DType::u8: gather<uint8_t, FromBool>(span, k, array.data, buffer); break;
  }
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

template <typename Acc>
constexpr DType dtype_of() {
  return sizeof(Acc) == 8 ? DType::f64 : DType::f32;
}

template <typename Acc>
struct Buffers {
  alignas(64) Acc in[kInputs][kBlock];
  alignas(64) Acc out[kMaxOuts][kBlock];
  NoiseBuffers noise;
};

inline SampleNoise sample_noise(const NoiseSource& source, int64_t b) {
  const int64_t* device = source.device_key;
  const uint64_t seed = device != nullptr ? static_cast<uint64_t>(device[0]) : source.seed;
  const uint64_t stream = device != nullptr ? static_cast<uint64_t>(device[1]) : source.stream;
  const uint32_t draw = source.draw + (device != nullptr ? static_cast<uint32_t>(device[2]) : 0u);
  const int64_t id = source.sample_ids != nullptr ? source.sample_ids[b] : b;
  return {source.draw_kind, philox_key(seed, stream), draw, static_cast<uint64_t>(id)};
}

// A pass on the CPU: the arrays that are read and written where they lie, and the elements of a block.
struct Plan {
  bool dense[kWalkArrays];
  NoiseTiles tiles;
  int64_t block;
};

inline void make_plan(const MapArgs& args, const Walk& walk, Plan& plan) {
  bool buffered = args.noise.draw_kind != Draw::none;
  for (int k = 0; k < kWalkArrays; ++k) {
    plan.dense[k] = is_dense(walk, k);
    if (given(args, k)) buffered = buffered || !plan.dense[k] || k == kMask;  // a mask is always brought to a buffer
  }
  plan.block = buffered ? kBlock : kChunk;
  if (args.noise.draw_kind != Draw::none && !plan.dense[kIndex]) plan.tiles = find_tiles(walk);
}

template <typename Acc>
Operand operand(const Plan& plan, const Span& span, int k, const Array& array, Acc* buffer) {
  if (!plan.dense[k]) return {buffer, dtype_of<Acc>()};
  const int64_t offset = span.b * span.walk->batch_stride[k] + span.begin;
  return {static_cast<char*>(array.data) + offset * size_of(array.dtype), array.dtype};
}

// Output j of a block; streamed: where its lines are whole, so that none is partly streamed and partly stored.
template <typename Acc>
Target target(const Plan& plan, const Span& span, int j, const Array& array, bool streamed, Acc* buffer) {
  const Operand to = operand(plan, span, kInputs + j, array, buffer);
  const bool aligned = reinterpret_cast<uintptr_t>(to.data) % 64 == 0;
  return {to.data, to.dtype, streamed && plan.dense[kInputs + j] && aligned};
}

// The inputs of a block; its outputs are the caller's to set.
template <typename Acc>
void set_inputs(const MapArgs& args, const Plan& plan, const Span& span, const Acc* cells, float* z,
                Buffers<Acc>& buffers, RowPass<Acc>& pass) {
  pass.cells = cells;
  pass.use_pred = args.use_pred;
  pass.n_out = args.n_out;
  for (int k = 0; k < kMask; ++k) {
    pass.in[k] = {nullptr, DType::f32};
    if (args.in[k].data == nullptr) continue;
    pass.in[k] = operand(plan, span, k, args.in[k], buffers.in[k]);
    if (!plan.dense[k]) load(span, k, args.in[k], buffers.in[k]);
  }
  if (z != nullptr) pass.in[kZ] = {z, DType::f32};
}

// v, known and the mask of a block.
template <typename Acc>
void set_elementwise(const MapArgs& args, const Plan& plan, const Span& span, Buffers<Acc>& buffers,
                     ElementwisePass<Acc>& pass) {
  const auto set = [&](int k, Operand& to) {
    to = {nullptr, dtype_of<Acc>()};
    if (args.in[k].data == nullptr) return;
    const bool buffered = !plan.dense[k] || k == kMask;
    if (buffered) load(span, k, args.in[k], buffers.in[k]);
    to = buffered ? Operand{buffers.in[k], dtype_of<Acc>()} : operand(plan, span, k, args.in[k], buffers.in[k]);
  };
  set(kV, pass.v), set(kKnownData, pass.known), set(kMask, pass.mask);
  pass.blended = args.blended;
}

// Calls body(task, span, cells, z) for every block of tasks [begin, end), in order; z is null where none is drawn.
template <typename Acc, typename Body>
void for_each_block(const MapArgs& args, const Walk& walk, const Plan& plan, int64_t block, int64_t begin, int64_t end,
                    NoiseBuffers& buffers, Body body) {
  const int64_t chunks = chunks_per_sample(walk.n);
  const bool by_tiles = plan.tiles.inner > 0;
  Acc cells[kRowCells];
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
    for (int64_t at = first; at < last; at += block) {
      const Span span{&walk, b, at, static_cast<int>(std::min(block, last - at))};
      float* z = noise.kind != Draw::none ? buffers.chunk() : nullptr;
      if (by_tiles) {
        const int64_t drawn = (at - first) % plan.tiles.at_once;
        if (drawn == 0) {
          const int64_t count = std::min(plan.tiles.at_once, last - at);
          draw_tiles(walk, plan.tiles, at, count, noise, buffers);
        }
        z += drawn;
      } else if (noise.kind != Draw::none) {
        draw_run(walk, plan.dense[kIndex], at, span.count, noise, buffers);
      }
      body(task, span, cells, z);
    }
  }
}

}  // namespace
}  // namespace GENKERN_ISA
}  // namespace genkern
