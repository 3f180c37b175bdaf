// The host's side of a pass: which kernel it is given to, and how it is laid over the device.
#pragma once

#include <iterator>
#include <type_traits>
#include <utility>

#include "walk_cuda.cuh"

namespace genkern {
namespace {

// Elements of a vector: 16 bytes of halves, or of float32.
inline int vector_width(const MapArgs& args) {
  if (args.f64) return 4;
  for (int k = 0; k < kArrays; ++k)
    if (given(args, k) && size_of(array_of(args, k).dtype) != 2) return 4;
  return 8;
}

// The tiles of a permuted walk. of() says whether there are any: every array is dense, no quad straddles rows, and a
// tile is worth a block.
struct Tiles {
  int32_t quad = 0, run = 1, pixels = 0;
  int64_t along = 1, of_sample = 1;  // tiles of that dimension, of a sample

  bool of(const Walk& walk, int vec) {
    constexpr int64_t kLeast = 512;
    if (!walk.dense) return false;
    while (quad < walk.ndim && walk.strides[kIndex][quad] != 1) ++quad;
    if (quad == walk.ndim || walk.sizes[quad] % vec != 0) return false;
    for (int d = walk.ndim - 1; d > quad; --d) {
      if (walk.sizes[d] * run * vec > kTile) return false;
      run *= static_cast<int32_t>(walk.sizes[d]);
    }
    if (walk.sizes[quad] * run < kLeast) return false;
    pixels = kTile / run / vec * vec;
    of_sample = along = (walk.sizes[quad] + pixels - 1) / pixels;
    for (int d = 0; d < quad; ++d) of_sample *= walk.sizes[d];
    return true;
  }
};

inline Layout layout_of(const MapArgs& args, const Walk& walk) {
  if (walk.linear) return Layout::linear;
  return args.noise.draw_kind != Draw::none && Tiles().of(walk, vector_width(args)) ? Layout::permuted
                                                                                    : Layout::strided;
}

// The terms of a pass, as kMapTerms and kReduceTerms have them. `reduced`: kResidual or 0.
inline uint32_t terms_of(const MapArgs& args, uint32_t reduced) {
  uint32_t found = terms(args.n_out, reduced);
  for (int k = 0; k < kInputs; ++k)
    if (args.in[k].data != nullptr) found |= 1u << k;
  if (args.noise.draw_kind != Draw::none) found |= kDrawn;
  return args.use_pred ? found | kPredicted : found;
}

// Of a pass of 16 bits: whether they are of one type, and of which. The mask may be of any.
inline Types halves_of(const MapArgs& args) {
  bool bf16 = true, f16 = true;
  for (int k = 0; k < kArrays; ++k) {
    if (!given(args, k) || k == kMask) continue;
    bf16 = bf16 && array_of(args, k).dtype == DType::bf16;
    f16 = f16 && array_of(args, k).dtype == DType::f16;
  }
  return bf16 ? Types::bf16 : f16 ? Types::f16 : Types::half;
}

// Whether a pass is of fixed types, in whole aligned vectors; and of which types.
inline bool fixed(const MapArgs& args, const Walk& walk, uint32_t reduced, Types& types) {
  if (args.f64 || args.noise.draw_kind == Draw::uniform) return false;
  const auto size = [&](int k) { return size_of(array_of(args, k).dtype); };
  const auto of_network = [&](int k) { return k == kM || k == kMUncond || k == kV || (k == kInputs && reduced != 0); };
  int state = 0, network = 0, least = 4;
  for (int k = 0; k <= kInputs; ++k) {
    if (!given(args, k) || k == kMask || (k >= kH0 && k <= kH2)) continue;
    int& common = of_network(k) ? network : state;
    if (common != 0 && common != size(k)) return false;
    common = size(k);
    least = std::min(least, common);
  }
  if (state == 0) state = network;
  for (int k = kH0; k < kInputs + args.n_out; ++k) {
    const bool either = given(args, k) && (k <= kH2 || k > kInputs);
    if (either && size(k) > state) return false;
    if (either) least = std::min(least, size(k));
  }
  if (state > 4 || network > state || (network == 4 && least == 2)) return false;
  types = state == 2 ? halves_of(args) : least == 2 ? Types::mixed : Types::f32;
  const int vec = vector_of(types);
  if (walk.n % vec != 0) return false;
  for (int k = 0; k < kArrays; ++k) {
    if (!given(args, k)) continue;
    const int64_t bytes = std::min(16, vec * size(k));
    if (reinterpret_cast<uintptr_t>(array_of(args, k).data) % bytes != 0) return false;
    if (walk.batch != 1 && walk.batch_stride[k] * size(k) % bytes != 0) return false;
  }
  return true;
}

// Halves that draw have kernels by type, the others one for both types.
template <uint32_t kTerms, Types kTypes, Layout kLayout, typename Operation>
bool launch_known(const Operation& operation) {
  constexpr bool kDraw = (kTerms & kDrawn) != 0;
  constexpr Types kOwn = are_halves(kTypes) && !kDraw ? Types::half : kTypes;
  if constexpr (kDraw && kTypes == Types::half) {
    return false;
  } else {
    operation.template launch<Vector<float, vector_of(kOwn), kLayout, Known<kTerms, kOwn>>>();
    return true;
  }
}

template <const auto& kTerms, Types kTypes, Layout kLayout, typename Operation, size_t... I>
bool launch_terms(uint32_t terms, const Operation& operation, std::index_sequence<I...>) {
  return ((terms == kTerms[I] && launch_known<kTerms[I], kTypes, kLayout>(operation)) || ...);
}

template <const auto& kTerms, Layout kLayout, typename Operation>
bool launch_types(uint32_t terms, Types types, const Operation& operation) {
  constexpr auto kAll = std::make_index_sequence<std::size(kTerms)>();
  switch (types) {
    case Types::f32: return launch_terms<kTerms, Types::f32, kLayout>(terms, operation, kAll);
    case Types::mixed: return launch_terms<kTerms, Types::mixed, kLayout>(terms, operation, kAll);
    case Types::bf16: return launch_terms<kTerms, Types::bf16, kLayout>(terms, operation, kAll);
    case Types::f16: return launch_terms<kTerms, Types::f16, kLayout>(terms, operation, kAll);
    default: return launch_terms<kTerms, Types::half, kLayout>(terms, operation, kAll);
  }
}

// A linear pass whose terms are asked for.
template <int kHs, int kOuts, bool kDraws, typename Operation>
void launch_typed(Types types, const Operation& operation) {
  const auto launch = [&](auto known) {
    constexpr Types kTypes = decltype(known)::value;
    using Facts = Typed<kHs, kOuts, kDraws, kTypes, Operation::kReduced != 0>;
    operation.template launch<Vector<float, vector_of(kTypes), Layout::linear, Facts>>();
  };
  switch (types) {
    case Types::f32: return launch(std::integral_constant<Types, Types::f32>());
    case Types::mixed: return launch(std::integral_constant<Types, Types::mixed>());
    default: return launch(std::integral_constant<Types, Types::half>());
  }
}

// Launches a kernel that was compiled for a pass of these types, if there is one: for its terms or, by typed(types),
// for any.
template <const auto& kLinear, const auto& kPermuted, typename Operation, typename LaunchTyped>
bool launch_fixed(const MapArgs& args, const Walk& walk, const Operation& operation, LaunchTyped typed) {
  Types types;
  if (!fixed(args, walk, Operation::kReduced, types)) return false;
  const uint32_t terms = terms_of(args, Operation::kReduced);
  if (walk.linear) {
    if (!launch_types<kLinear, Layout::linear>(terms, types, operation)) typed(types);
    return true;
  }
  return Tiles().of(walk, vector_of(types)) && launch_types<kPermuted, Layout::permuted>(terms, types, operation);
}

template <int kValue>
using Int = std::integral_constant<int, kValue>;
template <Layout kValue>
using Lies = std::integral_constant<Layout, kValue>;

// launch(Acc(), vector's elements, layout) of any pass.
template <typename Launch>
void launch_any(const MapArgs& args, const Walk& walk, Launch launch) {
  const auto vectors = [&](auto layout) {
    if (args.f64) {
      launch(double(), Int<4>(), layout);
    } else if (vector_width(args) == 8) {
      launch(float(), Int<8>(), layout);
    } else {
      launch(float(), Int<4>(), layout);
    }
  };
  switch (layout_of(args, walk)) {
    case Layout::linear: return vectors(Lies<Layout::linear>());
    case Layout::permuted: return vectors(Lies<Layout::permuted>());
    default: break;
  }
  constexpr Lies<Layout::strided> kStrided;
  args.f64 ? launch(double(), Int<1>(), kStrided) : launch(float(), Int<1>(), kStrided);
}

// operation.launch() of a kernel for any pass that draws no noise.
template <typename Operation>
void launch_undrawn(const MapArgs& args, const Walk& walk, const Operation& operation) {
  Types types;
  if (walk.linear && fixed(args, walk, Operation::kReduced, types))
    return launch_typed<kMaxH, kMaxOuts, false>(types, operation);
  launch_any(args, walk, [&](auto acc, auto vec, auto layout) {
    constexpr Layout kLayout = decltype(layout)::value;
    if constexpr (kLayout != Layout::permuted)
      operation.template launch<Vector<decltype(acc), decltype(vec)::value, kLayout, Any<kMaxH, kMaxOuts, false>>>();
  });
}

// Bits, by cell: those that a row has for each sample.
inline uint64_t cells_in_row(const RowSource& source) {
  if (source.table != nullptr) return ~uint64_t{0};
  uint64_t found = 0;
  for (int k = 0; k < source.n_values; ++k) found |= uint64_t{1} << source.values[k].cell;
  if (source.formula != Formula::none)
    for (const int cell :
         {int{kA}, int{kB}, kFirstOut + kOutY, kFirstOut + kOutX, kFirstOut + kOutM, kFirstOut + kOutZ})
      found |= uint64_t{1} << cell;
  return found;
}

// Has each thread read its sample's row for itself, if float32 can: every number is one, and so is its scale. A product
// of two of them is exact in float64, where the row is computed elsewhere, so that both ways round it once.
template <typename Acc>
bool set_direct(const RowSource& source, Acc* own, LinearPass<Acc>& pass) {
  if (source.table != nullptr || source.formula != Formula::none || source.n_values == 0) return false;
  for (int k = 0; k < source.n_values; ++k) {
    const Value& value = source.values[k];
    const bool exact = value.dtype == DType::f32 && static_cast<double>(static_cast<float>(value.scale)) == value.scale;
    if (!exact || value.stride < 0 || value.stride > 1) return false;
  }
  for (int k = 0; k < source.n_values; ++k) {
    const Value& value = source.values[k];
    pass.numbers[value.cell] = static_cast<const float*>(value.data);
    own[value.cell] = static_cast<Acc>(value.scale);
    if (value.stride == 1) pass.along |= uint64_t{1} << value.cell;
  }
  return true;
}

template <typename Acc>
void fill(const MapArgs& args, const Walk& walk, int vec, Pass<Acc>& pass) {
  for (int k = 0; k < kArrays; ++k) {
    pass.data[k] = nullptr;
    if (!given(args, k)) continue;
    const Array& array = array_of(args, k);
    pass.data[k] = array.data;
    pass.dtype[k] = array.dtype;
    pass.batch_stride[k] = walk.batch_stride[k];
    pass.given |= 1u << k;
    const int64_t bytes = std::min(16, vec * size_of(array.dtype));
    const bool rows_aligned = walk.batch == 1 || walk.batch_stride[k] * size_of(array.dtype) % bytes == 0;
    if (reinterpret_cast<uintptr_t>(array.data) % bytes == 0 && rows_aligned) pass.aligned |= 1u << k;
  }
  pass.batch = walk.batch;
  pass.n = walk.n;
  pass.n_out = args.n_out;
  pass.use_pred = args.use_pred;
  pass.by_sample = args.rows.by_sample();
  pass.in_row = cells_in_row(args.rows);
  for (int c = 0; c < kMaxCells; ++c) pass.cells[c] = static_cast<Acc>(args.rows.base[c]);
  pass.noise = args.noise;
  pass.keys = philox_rounds(philox_key(args.noise.seed, args.noise.stream));
  pass.rows = args.rows;
}

// Blocks from which on each may take several chunks, up to the number that a pass gains by. A fixed number, so that the
// tree of a sum is the same on every device.
constexpr int64_t kManyBlocks = 4096;

// Chunks that a block gains by. Where a scale is 1 blocks have nothing to do, and a formula is evaluated once a block.
// Where noise is drawn, what a block does before its first chunk and after its last counts the more, the more a pass is
// bound by arithmetic: in noise alone, in a loss, with an exponential, and in halves; elsewhere short blocks keep the
// memory busier than long ones. A loss takes as many whether it writes or not, so that its value is the same.
inline int most_chunks(const MapArgs& args, int vec, bool reduces) {
  if (args.scales_in_place() || args.rows.formula != Formula::none) return 16;
  if (args.noise.draw_kind == Draw::none) return 1;
  bool reads = false;
  for (const Array& in : args.in) reads = reads || in.data != nullptr;
  const int most = reduces || !reads || args.in[kV].data != nullptr ? 4 : 2;
  return vec == 8 ? 2 * most : most;
}

// Tiles that a block gains by, in every type: what a thread finds out before its first is much.
constexpr int kMostTiles = 8;

// Of so many chunks a group of samples, and so many groups: those of a block.
inline int32_t chunks_of(int64_t chunks, int64_t groups, int most) {
  return static_cast<int32_t>(std::max<int64_t>(std::min<int64_t>(chunks * groups / kManyBlocks, most), 1));
}

struct Launch {
  dim3 block, grid;
};

// Blocks along a sample by groups of samples, the groups along y and z.
inline Launch grid_of(dim3 block, int64_t blocks, int64_t batch) {
  const int64_t groups = (batch + block.y - 1) / block.y, along_y = std::min<int64_t>(groups, 32768);
  return {block, dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(along_y),
                      static_cast<unsigned>((groups + along_y - 1) / std::max<int64_t>(along_y, 1)))};
}

// Lays chunks of `unroll` vectors a thread over blocks.
inline Launch lay_chunks(int64_t batch, int64_t n, int vec, int unroll, int most, int64_t& blocks, int32_t& chunks) {
  const int64_t vectors = (n + vec - 1) / vec;
  int tx = kThreads / kMaxRows;
  while (tx < kThreads && static_cast<int64_t>(tx) * unroll < vectors) tx *= 2;
  const int ty = kThreads / tx;
  const int64_t chunk = static_cast<int64_t>(tx) * unroll, of_sample = (vectors + chunk - 1) / chunk;
  chunks = chunks_of(of_sample, (batch + ty - 1) / ty, most);
  blocks = (of_sample + chunks - 1) / chunks;
  return grid_of(dim3(tx, ty), blocks, batch);
}

// Fills a pass in, and lays it over the device.
template <typename V>
Launch lay(const MapArgs& args, const Walk& walk, int most, typename V::Pass& pass) {
  using Acc = typename V::Acc;
  fill<Acc>(args, walk, V::kVec, pass);
  static_assert(sizeof(typename V::Pass) <= 4000, "a kernel's parameters are 4 KiB at most");
  if constexpr (V::Facts::kElementwise) {
    for (int c = 0; c < kRowCells; ++c) pass.row[c] = static_cast<Acc>(args.rows.base[c]);
    pass.blended = args.blended;
  }
  if constexpr (V::Facts::kCopied && V::kLayout == Layout::linear) {
    if constexpr (V::Facts::kElementwise) {
      pass.direct = set_direct(args.rows, pass.row, pass);
    } else {
      pass.direct = set_direct(args.rows, pass.cells, pass);
    }
  }
  if constexpr (V::kLayout != Layout::linear) {
    pass.ndim = walk.ndim;
    for (int d = 0; d < walk.ndim; ++d) {
      pass.sizes[d] = walk.sizes[d];
      for (int k = 0; k < kWalkArrays; ++k) pass.strides[k][d] = walk.strides[k][d];
    }
  }
  if constexpr (V::kLayout == Layout::permuted) {
    Tiles tiles;
    tiles.of(walk, V::kVec);
    pass.quad = tiles.quad, pass.run = tiles.run, pass.pixels = tiles.pixels;
    pass.tiles_along = static_cast<uint32_t>(tiles.along), pass.tiles = static_cast<uint32_t>(tiles.of_sample);
    pass.chunks = chunks_of(tiles.of_sample, walk.batch, std::max(most, kMostTiles));
    pass.blocks = (tiles.of_sample + pass.chunks - 1) / pass.chunks;
    return grid_of(dim3(kThreads), pass.blocks, walk.batch);
  } else {
    return lay_chunks(walk.batch, walk.n, V::kVec, V::Facts::kUnroll, most, pass.blocks, pass.chunks);
  }
}

// Null, or what the runtime says of the last launch.
inline const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace
}  // namespace genkern
