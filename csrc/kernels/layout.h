// From sizes and strides to one canonical walk: sample by sample, and inside a sample in the order of memory.
//
// Element i of a sample is its C-order index whatever the strides, and the noise needs that index: it is carried along
// as one more array, whose strides are the C-order ones. Dimensions are sorted by the first output's strides (the first
// input's where nothing is written) and merged where every array allows it. A walk that ends with one dimension of
// stride 1 everywhere is `linear`.
#pragma once

#include <algorithm>

#include "kernels.h"

namespace genkern {

constexpr int kIndex = kInputs + kMaxOuts;  // the noise's index among the arrays of a walk
constexpr int kWalkArrays = kIndex + 1;

struct Walk {
  int64_t batch = 1;  // samples
  int64_t n = 1;      // elements a sample
  int32_t ndim = 0;   // inner dimensions, the fastest last
  bool linear = false;
  bool dense = false;  // linear but for the noise's index: a permutation of C order, the same in every array
  bool flat = false;   // the samples were merged into one: no noise, and one row for all
  int64_t sizes[kMaxDims];
  int64_t strides[kWalkArrays][kMaxDims];
  int64_t batch_stride[kWalkArrays];
};

namespace {

inline const Array& array_of(const MapArgs& args, int k) { return k < kInputs ? args.in[k] : args.out[k - kInputs]; }

inline bool given(const MapArgs& args, int k) {
  if (k == kIndex) return args.noise.draw_kind != Draw::none;
  if (k >= kInputs + args.n_out) return false;
  return array_of(args, k).data != nullptr;
}

// keep_samples: a reduction needs them apart; otherwise they are merged where nothing depends on the sample.
inline Walk make_walk(const MapArgs& args, bool keep_samples) {
  Walk walk;
  const bool merge_batch = !keep_samples && args.noise.draw_kind == Draw::none && !args.rows.differs();
  const int first = merge_batch ? 0 : 1;
  walk.flat = merge_batch;

  int64_t c_order[kMaxDims];
  int64_t step = 1;
  for (int d = args.ndim - 1; d >= first; --d) {
    c_order[d] = step;
    step *= args.sizes[d];
  }
  walk.n = step;
  walk.batch = merge_batch ? 1 : args.sizes[0];
  auto stride = [&](int k, int d) {
    if (k == kIndex) return c_order[d];
    return given(args, k) ? array_of(args, k).strides[d] : int64_t{0};
  };
  for (int k = 0; k < kWalkArrays; ++k) walk.batch_stride[k] = merge_batch || k == kIndex ? 0 : stride(k, 0);

  // A pass that writes nothing goes in the order of its first input.
  int lead = kInputs;
  for (int k = 0; args.out[0].data == nullptr && k < kInputs && lead == kInputs; ++k)
    if (given(args, k)) lead = k;
  int order[kMaxDims];
  int ndim = 0;
  for (int d = first; d < args.ndim; ++d)
    if (args.sizes[d] != 1) order[ndim++] = d;
  // Stable insertion sort, the largest stride of the leading array first; ties keep C order.
  for (int i = 1; i < ndim; ++i)
    for (int j = i; j > 0 && stride(lead, order[j]) > stride(lead, order[j - 1]); --j)
      std::swap(order[j], order[j - 1]);

  for (int i = 0; i < ndim; ++i) {
    const int d = order[i];
    bool merges = walk.ndim > 0;
    for (int k = 0; merges && k < kWalkArrays; ++k)
      if (given(args, k)) merges = walk.strides[k][walk.ndim - 1] == stride(k, d) * args.sizes[d];
    if (!merges) {
      walk.sizes[walk.ndim++] = 1;
    }
    const int last = walk.ndim - 1;
    walk.sizes[last] *= args.sizes[d];
    for (int k = 0; k < kWalkArrays; ++k) walk.strides[k][last] = stride(k, d);
  }
  if (walk.ndim == 0) {  // one element a sample
    walk.ndim = 1;
    walk.sizes[0] = 1;
    for (int k = 0; k < kWalkArrays; ++k) walk.strides[k][0] = 1;
  }
  const auto dense = [&](int k) {
    int64_t step = 1;
    for (int d = walk.ndim - 1; d >= 0; step *= walk.sizes[d--])
      if (walk.strides[k][d] != step) return false;
    return true;
  };
  walk.dense = true;
  for (int k = 0; walk.dense && k < kIndex; ++k)
    if (given(args, k)) walk.dense = dense(k);
  walk.linear = walk.dense && (!given(args, kIndex) || dense(kIndex));
  return walk;
}

}  // namespace
}  // namespace genkern
