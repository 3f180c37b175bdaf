// map on CUDA: one pass over the terms, every output written.
#include "map_cuda.cuh"

namespace genkern {
namespace {

template <typename V>
__global__ void __launch_bounds__(kThreads, V::kBlocks) map_kernel(const __grid_constant__ typename V::Pass pass) {
  __shared__ typename V::Shared shared;
  map_block<V>(pass, shared);
}

struct Map {
  static constexpr uint32_t kReduced = 0;
  const MapArgs& args;
  const Walk& walk;
  cudaStream_t stream;

  template <typename V>
  void launch() const {
    typename V::Pass pass{};
    const Launch laid = lay<V>(args, walk, most_chunks(args, V::kVec, /*reduces=*/false), pass);
    map_kernel<V><<<laid.grid, laid.block, 0, stream>>>(pass);
  }
};

// Whether a pass has more terms or outputs than the narrow kernels hold in registers.
bool is_wide(const MapArgs& args) {
  return args.n_out > 1 || args.in[kH1].data != nullptr || args.in[kH2].data != nullptr;
}

}  // namespace

const char* map_cuda(const MapArgs& args, void* stream) {
  const Walk walk = make_walk(args, /*keep_samples=*/false);
  if (walk.batch == 0 || walk.n == 0) return nullptr;
  const auto queue = static_cast<cudaStream_t>(stream);
  if (args.elementwise()) {
    map_elementwise(args, walk, queue);
    return launch_error();
  }
  const Map map{args, walk, queue};
  const bool draw = args.noise.draw_kind != Draw::none, wide = is_wide(args);
  const auto typed = [&](Types types) {
    if (wide) {
      draw ? launch_typed<kMaxH, kMaxOuts, true>(types, map) : launch_typed<kMaxH, kMaxOuts, false>(types, map);
    } else {
      draw ? launch_typed<1, 1, true>(types, map) : launch_typed<1, 1, false>(types, map);
    }
  };
  if (launch_fixed<kMapTerms, kMapPermutedTerms>(args, walk, map, typed)) return launch_error();
  launch_any(args, walk, [&](auto acc, auto vec, auto layout) {
    using Acc = decltype(acc);
    constexpr int kVec = decltype(vec)::value;
    constexpr Layout kLayout = decltype(layout)::value;
    if constexpr (kLayout == Layout::permuted) {
      map.launch<Vector<Acc, kVec, kLayout, Any<kMaxH, kMaxOuts, true>>>();
    } else if (kLayout == Layout::strided || wide) {
      draw ? map.launch<Vector<Acc, kVec, kLayout, Any<kMaxH, kMaxOuts, true>>>()
           : map.launch<Vector<Acc, kVec, kLayout, Any<kMaxH, kMaxOuts, false>>>();
    } else if constexpr (kLayout == Layout::linear) {
      draw ? map.launch<Vector<Acc, kVec, kLayout, Any<1, 1, true>>>()
           : map.launch<Vector<Acc, kVec, kLayout, Any<1, 1, false>>>();
    }
  });
  return launch_error();
}

}  // namespace genkern
