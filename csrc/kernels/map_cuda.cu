// map on CUDA: one pass over the terms, every output written.
#include "pass_cuda.cuh"

namespace genkern {
namespace {

template <typename Acc, int kVec, bool kLinear, bool kWide, bool kDraw>
__global__ void __launch_bounds__(kThreads) map_kernel(const __grid_constant__ Pass<Acc> pass) {
  using V = Vector<Acc, kVec, kLinear, kWide, kDraw>;
  __shared__ Acc rows[kMaxRows][kMaxCells];
  const int64_t b = sample_of_thread();
  V vector;
  vector.fetch(pass, b, element_of_thread<kVec>(pass, b), false);
  const Acc* cells = block_row(pass, rows, b);
  if (vector.count == 0) return;
  Acc out[V::kOuts][kVec];
  vector.apply(pass, cells, out);
#pragma unroll
  for (int j = 0; j < V::kOuts; ++j)
    if (j < pass.n_out) vector.put(pass, j, out[j]);
}

template <typename Acc, int kVec, bool kLinear, bool kWide, bool kDraw>
void launch(const MapArgs& args, const Walk& walk, cudaStream_t stream) {
  Pass<Acc> pass{};
  const Launch plan_ = plan(args, walk, kVec, pass);
  map_kernel<Acc, kVec, kLinear, kWide, kDraw><<<plan_.grid, plan_.block, 0, stream>>>(pass);
}

template <typename Acc, int kVec>
void launch_linear(const MapArgs& args, const Walk& walk, cudaStream_t stream) {
  const bool draw = args.noise.draw_kind != Draw::none;
  if (is_wide(args)) {
    draw ? launch<Acc, kVec, true, true, true>(args, walk, stream)
         : launch<Acc, kVec, true, true, false>(args, walk, stream);
  } else {
    draw ? launch<Acc, kVec, true, false, true>(args, walk, stream)
         : launch<Acc, kVec, true, false, false>(args, walk, stream);
  }
}

template <typename Acc>
void launch_strided(const MapArgs& args, const Walk& walk, cudaStream_t stream) {
  args.noise.draw_kind != Draw::none ? launch<Acc, 1, false, true, true>(args, walk, stream)
                                     : launch<Acc, 1, false, true, false>(args, walk, stream);
}

}  // namespace

const char* map_cuda(const MapArgs& args, void* stream_) {
  const Walk walk = make_walk(args, /*keep_samples=*/false);
  if (walk.batch == 0 || walk.n == 0) return nullptr;
  const auto stream = static_cast<cudaStream_t>(stream_);
  const int vec = vector_width(args, walk);
  if (vec == 1) {
    args.f64 ? launch_strided<double>(args, walk, stream) : launch_strided<float>(args, walk, stream);
  } else if (args.f64) {
    launch_linear<double, 4>(args, walk, stream);
  } else {
    vec == 8 ? launch_linear<float, 8>(args, walk, stream) : launch_linear<float, 4>(args, walk, stream);
  }
  return launch_error();
}

}  // namespace genkern
