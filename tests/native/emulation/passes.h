// Random passes: shapes, strides, types, terms, and the ways in which a row arrives.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "kernels.h"

using namespace genkern;

namespace {

std::mt19937_64 rng(20240607);

int64_t pick(int64_t lo, int64_t hi) { return lo + static_cast<int64_t>(rng() % static_cast<uint64_t>(hi - lo + 1)); }
bool chance(double p) { return static_cast<double>(rng() >> 11) * 0x1p-53 < p; }

const Parallel kSerial{
    [](int64_t count, int64_t, void* context, void (*body)(void*, int64_t, int64_t)) { body(context, 0, count); }};

int size_of_dtype(DType d) { return d == DType::f64 ? 8 : d == DType::f32 ? 4 : d == DType::u8 ? 1 : 2; }

struct Buffer {
  std::vector<unsigned char> bytes;
  std::vector<int64_t> strides;
  int64_t offset = 0;
  Array array(DType dtype) { return {bytes.data() + 64 + offset * size_of_dtype(dtype), dtype, strides.data()}; }
};

// Strides of a random dense permutation, unless `plain` sometimes with gaps, offset or expanded.
Buffer make_buffer(const std::vector<int64_t>& sizes, DType dtype, const std::vector<int>& order, bool plain,
                   bool expanded, bool random) {
  Buffer buffer;
  buffer.strides.assign(sizes.size(), 0);
  int64_t step = 1;
  const bool gap = !plain && chance(0.15);
  for (int d : order) {
    if (expanded && chance(0.4)) continue;
    buffer.strides[d] = step;
    step *= sizes[d];
    if (gap && chance(0.5)) step += 3;
  }
  buffer.offset = !plain && chance(0.3) ? pick(1, 3) : 0;
  buffer.bytes.assign((step + 8) * 8 + 128, 0xa5);
  if (!random) return buffer;
  std::normal_distribution<double> normal;
  auto* p = buffer.bytes.data() + 64 + buffer.offset * size_of_dtype(dtype);
  for (int64_t i = 0; i < step; ++i) {
    const double v = normal(rng);
    if (dtype == DType::f64) reinterpret_cast<double*>(p)[i] = v;
    if (dtype == DType::f32) reinterpret_cast<float*>(p)[i] = static_cast<float>(v);
    if (dtype == DType::u8) p[i] = v > 0;
    // A random half of moderate size: its bits drawn directly, the exponent kept away from infinity.
    if (dtype == DType::f16) reinterpret_cast<uint16_t*>(p)[i] = static_cast<uint16_t>(rng() & 0xbfffu);
    if (dtype == DType::bf16)
      reinterpret_cast<uint16_t*>(p)[i] = static_cast<uint16_t>((rng() & 0x807fu) | (pick(110, 130) << 7));
  }
  return buffer;
}

DType random_dtype(bool f64) {
  static const DType kFloat[] = {DType::f32, DType::f16, DType::bf16};
  return f64 && chance(0.6) ? DType::f64 : kFloat[pick(0, 2)];
}

struct Pass {
  MapArgs args;
  std::vector<Buffer> buffers = std::vector<Buffer>(kInputs + kMaxOuts);
  std::vector<double> table64;
  std::vector<float> table32;
  std::vector<int64_t> index, ids, key;
  std::vector<std::vector<double>> values;
  std::vector<std::vector<float>> values32;
  int in_place = -1;  // the input that output 0 is written over
  double scale = 1.0;
  bool by_m = false;
  std::vector<float> weight;  // by sample, of a reduction; may be empty
  bool unwritten = false;     // a reduction's residual is not wanted
};

// large: of some samples that more than one block takes in a selection. elementwise: v, or known and a mask, may be
// given.
void build(Pass& pass, bool reduce, bool large = false, bool elementwise = true) {
  MapArgs& args = pass.args;
  std::vector<int64_t> sizes{pick(1, !large && chance(0.2) ? 90 : 4)};
  // Half of the passes are of whole aligned vectors: those that kernels are compiled for.
  const bool plain = chance(0.5);
  if (large) {
    sizes.insert(sizes.end(), {5, 7, (plain ? 8 : 7) * pick(60, 260)});
  } else if (plain) {
    sizes.insert(sizes.end(), {pick(1, 5), pick(1, 6), 8 * pick(1, chance(0.5) ? 90 : 9)});
  } else {
    const int extra = static_cast<int>(pick(0, 3));
    for (int d = 0; d < extra; ++d) sizes.push_back(chance(0.08) ? pick(200, 700) : pick(1, 9));
    if (chance(0.03)) sizes.push_back(0);
  }
  args.ndim = static_cast<int>(sizes.size());
  std::vector<int> order;
  for (int d = args.ndim - 1; d >= 0; --d) order.push_back(d);
  const bool permuted = chance(plain ? 0.4 : 0.3);
  if (permuted && !plain) std::shuffle(order.begin(), order.end(), rng);
  if (permuted && plain) std::shuffle(order.begin(), order.end() - 1, rng);  // the batch stays slowest
  for (int d = 0; d < args.ndim; ++d) args.sizes[d] = sizes[d];
  args.f64 = chance(0.25);
  const bool halves = !args.f64 && chance(0.3);
  // Of plain passes: one type for the state, one for the network.
  const bool mixed = plain && !halves && !args.f64 && chance(0.6);
  const DType half = chance(0.5) ? DType::f16 : DType::bf16;

  auto give = [&](int k, DType dtype, bool output) {
    auto my_order = order;
    if (!plain && chance(0.15)) std::shuffle(my_order.begin(), my_order.end(), rng);
    pass.buffers[k] = make_buffer(sizes, dtype, my_order, plain, !plain && !output && chance(0.1), !output);
    (k < kInputs ? args.in[k] : args.out[k - kInputs]) = pass.buffers[k].array(dtype);
  };
  auto dtype = [&] {
    if (halves) return chance(0.5) ? DType::f16 : DType::bf16;
    return plain && !args.f64 ? DType::f32 : random_dtype(args.f64);
  };
  auto network = [&] { return mixed ? half : dtype(); };
  if (chance(0.8)) give(kX, args.f64 ? DType::f64 : dtype(), false);
  if (chance(0.8)) give(kM, network(), false);
  if (args.in[kM].data != nullptr && chance(plain ? 0.15 : 0.3)) give(kMUncond, network(), false);
  for (int k = kH0; k <= kH2; ++k)
    if (chance(plain ? 0.12 : 0.25)) give(k, dtype(), false);
  args.use_pred = (args.in[kX].data != nullptr || args.in[kM].data != nullptr) && chance(0.4);
  const bool draws = chance(plain ? 0.7 : 0.5);
  if (draws) {
    args.noise.draw_kind = chance(0.8) ? Draw::normal : Draw::uniform;
    args.noise.seed = rng(), args.noise.stream = rng(), args.noise.draw = static_cast<uint32_t>(rng());
    if (chance(0.5)) {
      for (int64_t b = 0; b < sizes[0]; ++b) pass.ids.push_back(static_cast<int64_t>(rng()));
      args.noise.sample_ids = pass.ids.data();
    }
    if (chance(0.3)) {
      pass.key = {static_cast<int64_t>(rng()), static_cast<int64_t>(rng()), pick(0, 100)};
      args.noise.device_key = pass.key.data();
    }
  } else if (chance(plain ? 0.2 : 0.5) || (args.in[kX].data == nullptr && args.in[kM].data == nullptr)) {
    give(kZ, dtype(), false);
  }
  if (reduce && chance(0.4)) {
    give(kMask, chance(0.5) ? DType::u8 : DType::f32, false);
    // Weights are not negative, so that their sum does not cancel.
    Buffer& mask = pass.buffers[kMask];
    if (args.in[kMask].dtype == DType::f32)
      for (size_t i = 3; i < mask.bytes.size(); i += 4) mask.bytes[i] &= 0x7f;
  }
  const bool noise = draws || args.in[kZ].data != nullptr;
  elementwise = elementwise && !reduce;
  if (elementwise && noise && chance(0.25)) give(kV, network(), false);
  if (elementwise && chance(0.25)) {
    give(kKnownData, dtype(), false);
    give(kMask, halves && chance(0.5) ? half : chance(0.5) ? DType::u8 : DType::f32, false);
    // Of every kind: 0, 1, between, and beyond.
    Buffer& mask = pass.buffers[kMask];
    if (args.in[kMask].dtype == DType::f32) {
      for (size_t i = 0; i + 3 < mask.bytes.size(); i += 4) {
        const float weight = static_cast<float>(pick(0, 1));
        if (chance(0.5)) std::memcpy(&mask.bytes[i], &weight, sizeof weight);
      }
    }
  }
  args.n_out = reduce ? 1 : static_cast<int>(chance(0.6) ? 1 : pick(2, 3));
  if (args.in[kKnownData].data != nullptr) args.blended = static_cast<uint32_t>(pick(1, (1 << args.n_out) - 1));
  for (int j = 0; j < args.n_out; ++j) give(kInputs + j, j > 0 || reduce ? network() : dtype(), true);

  RowSource& rows = args.rows;
  rows.n_cells = args.elementwise() ? kRowCells : kFirstOut + kOutCells * args.n_out;
  std::normal_distribution<double> normal;
  for (double& c : rows.base) c = normal(rng);
  rows.base[kLo] = -0.5, rows.base[kHi] = 0.7;
  if (chance(0.3)) {
    const int64_t r = pick(1, 5);
    for (int64_t c = 0; c < r * rows.n_cells; ++c) {
      pass.table64.push_back(normal(rng));
      pass.table32.push_back(static_cast<float>(pass.table64.back()));
    }
    rows.table = args.f64 ? static_cast<const void*>(pass.table64.data()) : pass.table32.data();
    rows.table_rows = r;
    rows.table_stride = rows.n_cells;
    const bool one = chance(0.5);
    for (int64_t b = 0; b < (one ? 1 : sizes[0]); ++b) pass.index.push_back(pick(0, r - 1));
    rows.index = pass.index.data();
    rows.index_stride = one ? 0 : 1;
  } else if (chance(0.6)) {
    if (chance(0.3)) {
      rows.formula = static_cast<Formula>(pick(1, 3));
      rows.base[26] = 0.6, rows.base[27] = 0.8, rows.base[28] = 0.8, rows.base[29] = 0.6, rows.base[30] = 0.5;
    }
    rows.n_values = static_cast<int>(pick(1, 4));
    // float32 numbers with a scale that float32 has are what a thread may read for itself.
    const bool single = chance(0.6);
    for (int k = 0; k < rows.n_values; ++k) {
      const bool one = chance(0.3);
      pass.values.emplace_back();
      for (int64_t b = 0; b < (one ? 1 : sizes[0]); ++b) pass.values.back().push_back(normal(rng));
      const bool of_path = rows.formula != Formula::none && chance(0.5);
      const bool last = args.elementwise() && chance(0.4);
      const auto is_taken = [&](int cell) {
        return std::any_of(rows.values, rows.values + k, [=](const Value& value) { return value.cell == cell; });
      };
      int cell = of_path && !is_taken(30) ? 30 : -1;
      while (cell < 0 || (cell != 30 && is_taken(cell)))
        cell = static_cast<int>(last ? pick(kL0, kRowCells - 1) : pick(0, kFirstOut + kOutCells * args.n_out - 1));
      const DType dtype = single || chance(0.3) ? DType::f32 : DType::f64;
      rows.values[k] = {nullptr, dtype, one ? 0 : 1, cell, chance(0.5) ? 1.0 : chance(0.8) ? -0.7f : -0.7};
      pass.values32.emplace_back(pass.values[k].begin(), pass.values[k].end());
    }
    for (int k = 0; k < rows.n_values; ++k) {
      const bool wide = rows.values[k].dtype == DType::f64;
      rows.values[k].data = wide ? static_cast<const void*>(pass.values[k].data()) : pass.values32[k].data();
    }
  }
}

}  // namespace
