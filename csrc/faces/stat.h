// The arguments of stat from a call, checked.
#pragma once

#include "../kernels/stat.h"
#include "call.h"

namespace genkern {

inline MapArgs make_undrawn_args(const Call& call, int64_t n_out) {
  expect(call.x || call.m || call.z, "x: expected x, m or z");
  expect(call.noise == 0, "noise: expected 0 (none) in a statistic, got ", call.noise);
  return make_args(call, n_out);
}

inline StatArgs make_stat_args(const Call& call, int64_t n_out, int64_t kind, double atol, double rtol) {
  expect(kind == 0 || kind == 1, "kind: expected 0 (moments) or 1 (error), got ", kind);
  StatArgs args;
  args.map = make_undrawn_args(call, n_out);
  args.kind = static_cast<Stat>(kind);
  args.atol = atol;
  args.rtol = rtol;
  return args;
}

inline QuantileArgs make_quantile_args(const Call& call, double q) {
  expect(q >= 0.0 && q <= 1.0, "q: expected a number from 0 to 1, got ", q);
  QuantileArgs args;
  args.map = make_undrawn_args(call, 1);
  args.q = q;
  return args;
}

}  // namespace genkern
