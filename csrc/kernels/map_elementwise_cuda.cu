// map on CUDA of passes with elementwise coefficients: a noise whose scale is exp(l0 + l1 v), and what is known.
//
// A file of their own: the other passes' kernels stay as they are, and the two compile side by side.
#include "map_cuda.cuh"

namespace genkern {
namespace {

template <typename V>
__global__ void __launch_bounds__(kThreads, V::kBlocks)
    map_elementwise_kernel(const __grid_constant__ typename V::Pass pass) {
  __shared__ typename V::Shared shared;
  map_block<V>(pass, shared);
}

struct MapElementwise {
  const MapArgs& args;
  const Walk& walk;
  cudaStream_t stream;

  template <typename V>
  void launch() const {
    typename V::Pass pass{};
    const Launch laid = lay<V>(args, walk, most_chunks(args, V::kVec, /*reduces=*/false), pass);
    map_elementwise_kernel<V><<<laid.grid, laid.block, 0, stream>>>(pass);
  }
};

// Launches the kernel that was compiled for this pass, if there is one.
bool launch_common(const MapArgs& args, const Walk& walk, const MapElementwise& map) {
  Types types;
  return walk.linear && fixed(args, walk, 0, types) &&
         launch_types<kElementwiseTerms, Layout::linear>(terms_of(args, 0), types, map);
}

}  // namespace

void map_elementwise(const MapArgs& args, const Walk& walk, cudaStream_t stream) {
  const MapElementwise map{args, walk, stream};
  if (launch_common(args, walk, map)) return;
  const bool draw = args.noise.draw_kind != Draw::none;
  launch_any(args, walk, [&](auto acc, auto vec, auto layout) {
    using Acc = decltype(acc);
    constexpr int kVec = decltype(vec)::value;
    constexpr Layout kLayout = decltype(layout)::value;
    if constexpr (kLayout == Layout::permuted) {
      map.launch<Vector<Acc, kVec, kLayout, Any<kMaxH, kMaxOuts, true, true>>>();
    } else {
      draw ? map.launch<Vector<Acc, kVec, kLayout, Any<kMaxH, kMaxOuts, true, true>>>()
           : map.launch<Vector<Acc, kVec, kLayout, Any<kMaxH, kMaxOuts, false, true>>>();
    }
  });
}

}  // namespace genkern
