// What both faces (torch, arrays) share: the arguments of a call as plain views, checked and turned into kernel
// arguments.
//
// The checks guard the raw entry points: shapes, types, devices and lengths, so that no call reads what it must not.
// genkern/check words the errors that users of gk.ops meet.
#pragma once

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "../kernels/kernels.h"

namespace genkern {

template <typename... Parts>
void expect(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

enum class Element { f32, f16, bf16, f64, boolean, int64, other };

struct Device {
  bool cuda = false;
  int32_t index = 0;
  bool operator==(const Device& o) const { return cuda == o.cuda && (!cuda || index == o.index); }
};

// A tensor of a face; sizes and strides (in elements) point into it.
struct View {
  void* data = nullptr;
  Element element = Element::other;
  Device device;
  int32_t ndim = 0;
  const int64_t* sizes = nullptr;
  const int64_t* strides = nullptr;

  int64_t numel() const {
    int64_t n = 1;
    for (int32_t d = 0; d < ndim; ++d) n *= sizes[d];
    return n;
  }

  bool contiguous() const {
    int64_t step = 1;
    for (int32_t d = ndim - 1; d >= 0; --d) {
      if (sizes[d] != 1 && strides[d] != step) return false;
      step *= sizes[d];
    }
    return true;
  }
};

using MaybeView = std::optional<View>;

struct Call {
  MaybeView x, m, m_uncond;
  std::vector<View> h;
  MaybeView z;
  std::vector<double> row;
  MaybeView table, index;
  std::vector<View> values;
  std::vector<int64_t> cells;
  std::vector<double> scales;
  int64_t formula = 0;
  int64_t noise = 0;
  std::vector<int64_t> key;
  MaybeView device_key, sample_ids;
  bool use_pred = false;
  MaybeView mask;
  std::vector<View> out;
  // Of map alone: what its elementwise coefficients are of, beside the mask, and bits of the outputs that are blended.
  MaybeView v, known;
  int64_t blended = 0;
};

inline DType floating(const View& v, const char* name) {
  switch (v.element) {
    case Element::f32: return DType::f32;
    case Element::f16: return DType::f16;
    case Element::bf16: return DType::bf16;
    case Element::f64: return DType::f64;
    default: break;
  }
  expect(false, name, ": expected float32, float16, bfloat16 or float64");
  return DType::f32;
}

inline void expect_device(const View& v, const View& like, const char* name) {
  expect(v.device == like.device, name, ": expected on the state's device");
}

inline void expect_memory(const View& v, const char* name) {
  expect(v.data != nullptr || v.numel() == 0, name, ": expected a tensor with memory, got one that has none");
}

inline const int64_t* int64_data(const View& v, const View& like, const char* name) {
  expect_memory(v, name);
  expect_device(v, like, name);
  expect(v.element == Element::int64 && v.contiguous(), name, ": expected contiguous int64");
  return static_cast<const int64_t*>(v.data);
}

inline Array array_of(const View& v, const View& like, const char* name) {
  bool same = v.ndim == like.ndim;
  for (int32_t d = 0; same && d < v.ndim; ++d) same = v.sizes[d] == like.sizes[d];
  expect(same, name, ": expected the state's shape");
  expect_memory(v, name);
  expect_device(v, like, name);
  return {v.data, floating(v, name), v.strides};
}

// The bytes between which a view's elements lie.
struct Extent {
  uintptr_t begin, end;
};

inline Extent extent(const View& v, int64_t size) {
  int64_t low = 0, high = 0;
  for (int32_t d = 0; d < v.ndim; ++d) {
    const int64_t last = (v.sizes[d] - 1) * v.strides[d];
    (last < 0 ? low : high) += last;
  }
  const auto data = reinterpret_cast<uintptr_t>(v.data);
  return {data + static_cast<uintptr_t>(low * size), data + static_cast<uintptr_t>((high + 1) * size)};
}

inline int64_t element_size(Element element) {
  switch (element) {
    case Element::f16:
    case Element::bf16: return 2;
    case Element::f32: return 4;
    case Element::boolean: return 1;
    default: return 8;
  }
}

// An output is an input itself or apart from it, and apart from coefficients and other outputs. Of two interleaved
// views only the caller knows; of two dense ones whose bytes meet, the pass would read what it has written.
inline void expect_apart(const View& out, const View& in, const char* name, bool may_be_same) {
  if (may_be_same && in.data == out.data && in.element == out.element) {
    bool same = true;
    for (int32_t d = 0; same && d < out.ndim; ++d) same = out.sizes[d] == 1 || in.strides[d] == out.strides[d];
    if (same) return;
  }
  if (!out.contiguous() || !in.contiguous()) return;
  const Extent a = extent(out, element_size(out.element)), b = extent(in, element_size(in.element));
  const bool apart = a.end <= b.begin || b.end <= a.begin;
  if (may_be_same) return expect(apart, "out: expected ", name, " itself, or memory apart from it");
  expect(apart, "out: expected memory apart from ", name);
}

inline void expect_outputs_apart(const Call& call) {
  for (size_t j = 0; j < call.out.size(); ++j) {
    const View& out = call.out[j];
    if (out.numel() == 0) return;
    for (int32_t d = 0; d < out.ndim; ++d)
      expect(out.sizes[d] == 1 || out.strides[d] != 0, "out: expected elements with addresses of their own");
    const auto apart = [&](const MaybeView& in, const char* name) {
      if (in) expect_apart(out, *in, name, true);
    };
    apart(call.x, "x");
    apart(call.m, "m");
    apart(call.m_uncond, "m_uncond");
    apart(call.z, "z");
    apart(call.v, "v");
    apart(call.known, "known");
    if (call.known) apart(call.mask, "mask");
    for (const View& h : call.h) expect_apart(out, h, "h", true);
    if (call.table) expect_apart(out, *call.table, "table", false);
    for (const View& value : call.values) expect_apart(out, value, "values", false);
    for (size_t k = 0; k < j; ++k) {
      expect(out.data != call.out[k].data, "out: expected outputs apart from each other");
      expect_apart(out, call.out[k], "the other output", false);
    }
  }
}

inline void set_table(const Call& call, const View& like, int n_cells, int64_t batch, bool f64, RowSource& rows) {
  const View& table = *call.table;
  expect_memory(table, "table");
  expect_device(table, like, "table");
  expect(call.row.empty() && call.values.empty() && call.formula == 0,
         "table: expected neither row, values nor formula beside it");
  expect(table.ndim == 2 && table.sizes[1] == n_cells, "table: expected rows of ", n_cells, " cells, got ",
         table.ndim == 2 ? table.sizes[1] : int64_t{0});
  expect(table.element == (f64 ? Element::f64 : Element::f32) && table.contiguous(),
         "table: expected contiguous float32 (float64 for float64 states)");
  rows.table = table.data;
  rows.table_rows = table.sizes[0];
  if (call.index) {
    const int64_t n = call.index->numel();
    expect(n == 1 || n == batch, "index: expected 1 or ", batch, " elements, got ", n);
    expect(table.sizes[0] > 0, "table: expected at least one row");
    rows.index = int64_data(*call.index, like, "index");
    rows.index_stride = n == 1 ? 0 : 1;
    rows.table_stride = n_cells;
  } else {
    expect(table.sizes[0] == 1 || table.sizes[0] == batch, "table: expected 1 or ", batch, " rows, got ",
           table.sizes[0]);
    rows.table_stride = table.sizes[0] == 1 ? 0 : n_cells;
  }
}

inline void set_rows(const Call& call, const View& like, int n_out, int64_t batch, bool f64, RowSource& rows) {
  const bool elementwise = call.v || call.known;
  const int n_cells = elementwise ? kRowCells : kFirstOut + kOutCells * n_out;
  expect(call.formula >= 0 && call.formula <= 3, "formula: expected 0 to 3, got ", call.formula);
  rows.n_cells = n_cells;
  rows.formula = static_cast<Formula>(call.formula);
  if (call.table) return set_table(call, like, n_cells, batch, f64, rows);

  const bool formula = call.formula != 0;
  const size_t expected = formula && !elementwise ? kAllCells : n_cells;
  expect(call.row.size() == expected, "row: expected ", expected, " cells, got ", call.row.size());
  for (size_t c = 0; c < expected; ++c) rows.base[c] = call.row[c];
  expect(call.values.size() == call.cells.size() && call.values.size() == call.scales.size() &&
             call.values.size() <= kMaxValues,
         "values: expected as many cells and scales, at most ", kMaxValues);
  rows.n_values = static_cast<int32_t>(call.values.size());
  for (int32_t k = 0; k < rows.n_values; ++k) {
    const View& value = call.values[k];
    const int64_t cell = call.cells[k], n = value.numel();
    expect_memory(value, "values");
    expect_device(value, like, "values");
    const bool of_path = cell >= kMaxCells && cell < kAllCells;
    expect(of_path ? formula : cell >= 0 && cell < n_cells, "cells: ", cell, " is no cell of this row");
    for (int32_t l = 0; l < k; ++l) expect(call.cells[l] != cell, "cells: expected each once, got ", cell, " twice");
    expect(n == 1 || n == batch, "values: expected 1 or ", batch, " elements, got ", n);
    const DType dtype = floating(value, "values");
    expect((dtype == DType::f32 || dtype == DType::f64) && value.contiguous(),
           "values: expected contiguous float32 or float64");
    rows.values[k] = {value.data, dtype, n == 1 ? 0 : 1, static_cast<int32_t>(cell), call.scales[k]};
  }
}

inline void set_noise(const Call& call, const View& like, int64_t batch, NoiseSource& noise) {
  expect(call.noise >= 0 && call.noise <= 2, "noise: expected 0 (none), 1 (normal) or 2 (uniform), got ", call.noise);
  expect(call.noise == 0 || !call.z, "z: expected none beside drawn noise");
  noise.draw_kind = static_cast<Draw>(call.noise);
  if (call.noise == 0) return;
  expect(call.key.size() == 3, "key: expected seed, stream and draw, got ", call.key.size(), " numbers");
  noise.seed = static_cast<uint64_t>(call.key[0]);
  noise.stream = static_cast<uint64_t>(call.key[1]);
  noise.draw = static_cast<uint32_t>(call.key[2]);
  if (call.device_key) {
    expect(call.device_key->numel() == 3, "device_key: expected 3 elements, got ", call.device_key->numel());
    noise.device_key = int64_data(*call.device_key, like, "device_key");
  }
  if (call.sample_ids) {
    expect(call.sample_ids->numel() == batch, "sample_ids: expected ", batch, " elements, got ",
           call.sample_ids->numel());
    noise.sample_ids = int64_data(*call.sample_ids, like, "sample_ids");
  }
  expect(batch == 0 || like.numel() / batch <= int64_t{1} << 34, "size: expected at most 2^34 elements a sample");
}

// The view whose shape and device all others share: the first given of x, m, z, out.
inline const View& like_of(const Call& call) {
  if (call.x) return *call.x;
  if (call.m) return *call.m;
  if (call.z) return *call.z;
  expect(!call.out.empty(), "x: expected x, m, z or an output");
  return call.out[0];
}

// v, known and the mask beside it.
inline void set_elementwise(const Call& call, MapArgs& args) {
  expect(!call.v || call.z || call.noise != 0, "v: expected noise that it scales");
  const int64_t all = (int64_t{1} << args.n_out) - 1;
  expect(call.known ? call.blended > 0 && call.blended <= all : call.blended == 0, "blended: expected ",
         call.known ? "bits of the outputs" : "0 without known", ", got ", call.blended);
  expect(!call.known || call.mask, "mask: expected one beside known");
  args.blended = static_cast<uint32_t>(call.blended);
}

// The kernel's arguments for a row with n_out outputs, which lie in call.out or nowhere; they point into call's views.
inline MapArgs make_args(const Call& call, int64_t n_out) {
  expect(n_out >= 1 && n_out <= kMaxOuts, "out: expected 1 to 3 outputs, got ", n_out);
  const View& like = like_of(call);
  expect(like.ndim >= 1 && like.ndim <= kMaxDims, "x: expected 1 to 16 dimensions, got ", like.ndim);
  MapArgs args;
  args.ndim = like.ndim;
  for (int32_t d = 0; d < args.ndim; ++d) args.sizes[d] = like.sizes[d];
  const int64_t batch = args.sizes[0];
  args.f64 = floating(like, "x") == DType::f64;

  auto set = [&](int input, const MaybeView& v, const char* name) {
    if (!v) return;
    args.in[input] = array_of(*v, like, name);
    expect(args.f64 || args.in[input].dtype != DType::f64, name,
           ": expected no float64 beside a state of lower precision");
  };
  set(kX, call.x, "x");
  set(kM, call.m, "m");
  set(kMUncond, call.m_uncond, "m_uncond");
  set(kZ, call.z, "z");
  set(kV, call.v, "v");
  set(kKnownData, call.known, "known");
  expect(!call.m_uncond || call.m, "m_uncond: expected m beside it");
  expect(call.x || call.m || call.z || call.noise != 0 || !call.h.empty(), "x: expected at least one term");
  expect(!call.use_pred || call.x || call.m, "use_pred: expected x or m");
  expect(call.h.size() <= kMaxH, "h: expected at most 3 tensors, got ", call.h.size());
  for (size_t k = 0; k < call.h.size(); ++k) set(kH0 + static_cast<int>(k), call.h[k], "h");
  if (call.mask) {
    View mask = *call.mask;
    const bool boolean = mask.element == Element::boolean;
    if (boolean) mask.element = Element::f32;
    set(kMask, mask, "mask");
    if (boolean) args.in[kMask].dtype = DType::u8;
  }
  args.n_out = static_cast<int32_t>(n_out);
  set_elementwise(call, args);
  for (size_t j = 0; j < call.out.size(); ++j) args.out[j] = array_of(call.out[j], like, "out");
  expect_outputs_apart(call);
  args.use_pred = call.use_pred;
  set_rows(call, like, args.n_out, batch, args.f64, args.rows);
  set_noise(call, like, batch, args.noise);
  return args;
}

inline MapArgs make_args(const Call& call) { return make_args(call, static_cast<int64_t>(call.out.size())); }

}  // namespace genkern
