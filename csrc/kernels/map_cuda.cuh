// What the kernels of map share, those of passes with elementwise coefficients and the others: each are compiled in a
// file of their own.
#pragma once

#include "launch_cuda.cuh"

namespace genkern {

// map of a pass with v or known, which has elements.
void map_elementwise(const MapArgs& args, const Walk& walk, cudaStream_t stream);

namespace {

// A block's part of a pass, every output written.
template <typename V>
__device__ __forceinline__ void map_block(const typename V::Pass& pass, typename V::Shared& shared) {
  walk<V>(pass, shared, [&](const V& vector, const auto& cells, auto draw) {
    typename V::Acc out[V::kOuts][V::kVec];
    vector.apply(pass, cells, draw, out);
#pragma unroll
    for (int j = 0; j < V::kOuts; ++j)
      if (j < V::Facts::n_out(pass)) vector.put(pass, j, out[j]);
  });
}

}  // namespace
}  // namespace genkern
