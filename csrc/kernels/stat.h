// Statistics of every sample of a row's outputs, none of which is written anywhere.
//
//   moments   sum out_j, then sum out_i out_j for i <= j: n_out + n_out (n_out + 1) / 2 numbers
//   error     sum (out_0 / (atol + rtol max(|out_1|, |out_2|)))^2
//   quantile  of |out_0|, as torch.quantile interpolates it: with p = q (n - 1) and v sorted,
//             v[floor p] + (p - floor p) (v[floor p + 1] - v[floor p])
//
// Sums are float64, of products formed in float64 (exact ones where the arithmetic is float32), in an order that
// depends on the sample's size and layout alone: the same bits in every batch. A quantile is found by radix selection:
// the bits of a number that is not negative are in the order of the numbers, and are settled kDigitBits at a time, from
// the top, by counting how many numbers have which; integers, so that no order of counting matters.
#pragma once

#include "kernels.h"
#include "platform.h"

namespace genkern {

enum class Stat : int32_t { moments = 0, error = 1 };

constexpr int kMaxSums = kMaxOuts + kMaxOuts * (kMaxOuts + 1) / 2;

constexpr int sums_of(Stat kind, int n_out) { return kind == Stat::error ? 1 : n_out + n_out * (n_out + 1) / 2; }

struct StatArgs {
  MapArgs map;  // its outputs have no memory
  Stat kind = Stat::moments;
  double atol = 0.0, rtol = 0.0;
  double* sums = nullptr;     // [B, sums_of()]
  void* workspace = nullptr;  // stat_workspace() bytes
};

struct QuantileArgs {
  MapArgs map;  // one output, without memory
  double q = 0.5;
  void* out = nullptr;        // [B] of the arithmetic's type; NaN of a sample with a NaN, or without elements
  void* workspace = nullptr;  // quantile_workspace() bytes
};

void stat_cpu(const StatArgs& args, const Parallel& parallel);
void quantile_cpu(const QuantileArgs& args, const Parallel& parallel);
size_t stat_workspace_cpu(const MapArgs& args);
size_t quantile_workspace_cpu(const MapArgs& args);

const char* stat_cuda(const StatArgs& args, void* stream);
const char* quantile_cuda(const QuantileArgs& args, void* stream);
size_t stat_workspace_cuda(const MapArgs& args);
size_t quantile_workspace_cuda(const MapArgs& args);

namespace {

constexpr int kDigitBits = 11, kBins = 1 << kDigitBits;

// A number that is not negative, as an integer in the same order.
GENKERN_HD uint64_t key_of(float v) { return bits_of(v); }
GENKERN_HD uint64_t key_of(double v) {
  uint64_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits;
}

GENKERN_HD void value_of(uint64_t key, float& v) { v = float_of(static_cast<uint32_t>(key)); }
GENKERN_HD void value_of(uint64_t key, double& v) { std::memcpy(&v, &key, sizeof v); }

// Digit d of a key, from the top: the sign, which is 0, is left out.
template <typename Acc>
struct Digit {
  static constexpr int kKeyBits = 8 * static_cast<int>(sizeof(Acc)) - 1;
  static constexpr int kCount = (kKeyBits + kDigitBits - 1) / kDigitBits;
  int shift, width;

  GENKERN_HD explicit Digit(int d) {
    const int left = kKeyBits - kDigitBits * d;
    width = left < kDigitBits ? left : kDigitBits;
    shift = left - width;
  }
  GENKERN_HD uint64_t prefix(uint64_t key) const { return key >> shift >> width; }
  GENKERN_HD int bin(uint64_t key) const { return static_cast<int>(key >> shift & ((uint64_t{1} << width) - 1)); }
};

// Where a quantile lies among a sample's sorted numbers.
struct Place {
  uint64_t rank;
  double rest;  // toward the number of rank + 1
};

inline Place place_of(double q, int64_t n) {
  const double p = n > 0 ? q * static_cast<double>(n - 1) : 0.0;
  return {static_cast<uint64_t>(p), p - std::floor(p)};
}

template <typename Acc>
GENKERN_HD Acc interpolate(Acc low, Acc high, double rest) {
  if (rest == 0.0 || low == high) return low;  // infinite ones too
  const double a = static_cast<double>(low), b = static_cast<double>(high);
  return static_cast<Acc>(a + rest * (b - a));
}

// A term of the error's sum, before it is squared. NaN where a number is.
template <typename Acc>
GENKERN_HD Acc scaled_error(Acc error, Acc first, Acc second, Acc atol, Acc rtol) {
  const Acc a = first < Acc(0) ? -first : first, b = second < Acc(0) ? -second : second;
  const Acc larger = a > b ? a : (b >= a ? b : a + b);
  return error / (atol + rtol * larger);
}

}  // namespace
}  // namespace genkern
