// exp, the same bits on CUDA and on every instruction set of the CPU, for float and for double.
//
//   exp(t) = 2^n exp(r),   n = t / log(2) to the nearest integer,   r = t - n log(2) in two parts, |r| <= log(2) / 2
//   exp(r) = 1 + (r + r^2 Q(r))
//
// Q is a minimax polynomial (tools/minimax.py), evaluated in one order of fused multiply-adds; 2^n comes in as two
// powers of two, of which the first is exact and the second rounds where the result is subnormal. 0 and infinity are
// reached where the correctly rounded function reaches them; NaN stays NaN. Within 1.5 ulp (tests/test_elementwise.py).
//
// One source for a number and for a vector of them: Ops names the type, and what no operator says of it.
#pragma once

#include "platform.h"

namespace genkern {
namespace {

// exp(r), |r| <= log(2) / 2, as a float
// largest weighted error 3.8e-09 (3.1e-09 before the coefficients were rounded)
constexpr float kExpF0 = 0x1.fffffcp-2f;
constexpr float kExpF1 = 0x1.555492p-3f;
constexpr float kExpF2 = 0x1.5558f2p-5f;
constexpr float kExpF3 = 0x1.1239d4p-7f;
constexpr float kExpF4 = 0x1.6a245p-10f;
constexpr float kLog2EF = 0x1.715476p+0f;
constexpr float kLn2HighF = 0x1.62e4p-1f;
constexpr float kLn2LowF = 0x1.7f7d1cp-20f;
// as a double
// largest weighted error 1.1e-17 (3.6e-18 before the coefficients were rounded)
constexpr double kExpD0 = 0x1.000000000000ap-1;
constexpr double kExpD1 = 0x1.55555555554fap-3;
constexpr double kExpD2 = 0x1.555555555088cp-5;
constexpr double kExpD3 = 0x1.1111111127b9cp-7;
constexpr double kExpD4 = 0x1.6c16c18426808p-10;
constexpr double kExpD5 = 0x1.a01a012a691fbp-13;
constexpr double kExpD6 = 0x1.a0199a16adca7p-16;
constexpr double kExpD7 = 0x1.71df253c8d868p-19;
constexpr double kExpD8 = 0x1.28ad68d130621p-22;
constexpr double kExpD9 = 0x1.ad7f75c76ab4p-26;
constexpr double kLog2ED = 0x1.71547652b82fep+0;
constexpr double kLn2HighD = 0x1.62e42fefa4p-1;
constexpr double kLn2LowD = -0x1.8432a1b0e2634p-43;

// low, high: beyond them the result is 0 or infinity. magic: a sum with it is rounded to an integer, which its last
// bits then are.
template <typename Acc>
struct ExpOf;

template <>
struct ExpOf<float> {
  using Bits = uint32_t;
  static constexpr float kLog2E = kLog2EF, kLn2High = kLn2HighF, kLn2Low = kLn2LowF;
  static constexpr float kLow = -104.0f, kHigh = 89.0f, kMagic = 0x1.8p23f;
  static constexpr Bits kMagicBits = 0x4b400000u;
  static constexpr int kBias = 127, kMantissa = 23;
};

template <>
struct ExpOf<double> {
  using Bits = uint64_t;
  static constexpr double kLog2E = kLog2ED, kLn2High = kLn2HighD, kLn2Low = kLn2LowD;
  static constexpr double kLow = -746.0, kHigh = 710.0, kMagic = 0x1.8p52;
  static constexpr Bits kMagicBits = 0x4338000000000000u;
  static constexpr int kBias = 1023, kMantissa = 52;
};

// A single number.
template <typename Acc_>
struct OneNumber {
  using Acc = Acc_;
  using Value = Acc;
  using Bits = typename ExpOf<Acc>::Bits;

  static GENKERN_HD Value all(Acc a) { return a; }
  static GENKERN_HD Value fma(Value a, Value b, Value c) { return fma_(a, b, c); }
  static GENKERN_HD Bits bits(Value a) { return bits_of(a); }
  static GENKERN_HD Value of_bits(Bits a) { return float_of(a); }
};

// ((q r + c) r + ...), the highest coefficient first.
template <typename Ops>
GENKERN_HD typename Ops::Value horner(typename Ops::Value, typename Ops::Value q) {
  return q;
}

template <typename Ops, typename... Rest>
GENKERN_HD typename Ops::Value horner(typename Ops::Value r, typename Ops::Value q, typename Ops::Acc c, Rest... rest) {
  return horner<Ops>(r, Ops::fma(q, r, Ops::all(c)), rest...);
}

template <typename Ops>
GENKERN_HD typename Ops::Value exp_polynomial(typename Ops::Value r, float) {
  return horner<Ops>(r, Ops::all(kExpF4), kExpF3, kExpF2, kExpF1, kExpF0);
}

template <typename Ops>
GENKERN_HD typename Ops::Value exp_polynomial(typename Ops::Value r, double) {
  return horner<Ops>(r, Ops::all(kExpD9), kExpD8, kExpD7, kExpD6, kExpD5, kExpD4, kExpD3, kExpD2, kExpD1, kExpD0);
}

template <typename Ops>
GENKERN_HD typename Ops::Value exp_(typename Ops::Value t) {
  using Acc = typename Ops::Acc;
  using Value = typename Ops::Value;
  using Numbers = ExpOf<Acc>;
  const Value low = Ops::all(Numbers::kLow), high = Ops::all(Numbers::kHigh);
  const Value below = t > high ? high : t;
  const Value a = t < low ? low : below;  // NaN stays NaN
  const Value shifted = Ops::fma(a, Ops::all(Numbers::kLog2E), Ops::all(Numbers::kMagic));
  const Value n = shifted - Ops::all(Numbers::kMagic);
  Value r = Ops::fma(n, Ops::all(-Numbers::kLn2High), a);
  r = Ops::fma(n, Ops::all(-Numbers::kLn2Low), r);
  const Value p = Ops::all(Acc(1)) + Ops::fma(r * r, exp_polynomial<Ops>(r, Acc()), r);
  // n + 2 bias, as the sum of two biased exponents of about the same size.
  constexpr typename Numbers::Bits kOffset = 2 * Numbers::kBias - Numbers::kMagicBits;
  const typename Ops::Bits both = Ops::bits(shifted) + kOffset, first = both >> 1;
  return p * Ops::of_bits(first << Numbers::kMantissa) * Ops::of_bits((both - first) << Numbers::kMantissa);
}

}  // namespace
}  // namespace genkern
