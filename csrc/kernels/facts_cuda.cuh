// What a kernel knows of its pass when it is compiled.
//
// The general kernels (Any) ask the pass: which terms it has and of what types are uniform branches at run time, so
// that one of them serves every pass. A branch holds a warp back for tens of cycles before its next load is issued, and
// room for every term and type fills the registers: up to half of the memory's rate, in 16 bits more. Passes of the
// usual types in whole vectors have kernels that ask for the terms alone (Typed); those that samplers and losses are
// made of (kMapTerms, kReduceTerms) are compiled with their terms fixed as well (Known), from the same source.
#pragma once

#include <cstddef>

#include "rows.h"

namespace genkern {
namespace {

// Terms of a known pass: the inputs that are given, by number; normals drawn; data predicted; whether its output is a
// residual; outputs.
constexpr uint32_t kDrawn = 1u << kInputs, kPredicted = kDrawn << 1, kResidual = kDrawn << 2;
constexpr int kOutsShift = kInputs + 3;

constexpr uint32_t terms(int n_out, uint32_t others) { return others | static_cast<uint32_t>(n_out) << kOutsShift; }
constexpr uint32_t residual(uint32_t others) { return terms(1, others | kResidual); }

constexpr uint32_t X = 1u << kX, M = 1u << kM, U = 1u << kMUncond, H = 1u << kH0, H1 = 1u << kH1, Z = 1u << kZ;
constexpr uint32_t Mask = 1u << kMask;
constexpr uint32_t Scaled = 1u << kV, Blended = 1u << kKnownData | Mask;

// Two outputs: the state and the network's next input, or the noise, or a prediction that is kept.
constexpr uint32_t kMapTerms[] = {
    terms(1, kDrawn),  // noise; an initial state
    terms(1, X),
    terms(1, X | kDrawn),
    terms(2, X | kDrawn),  // scaling, noising
    terms(1, X | H),
    terms(1, X | Z),  // noising with given noise, interpolation
    terms(1, X | M),
    terms(2, X | M),  // Euler, DDIM, consistency
    terms(1, X | M | kPredicted),
    terms(2, X | M | kPredicted),  // the same, clamped
    terms(1, X | M | U),
    terms(1, X | M | U | kPredicted),  // guided
    terms(3, X | M | U),
    terms(3, X | M | U | kPredicted),  // guided, both halves of the next input
    terms(1, X | M | kDrawn),
    terms(2, X | M | kDrawn),  // DDPM
    terms(1, X | M | kDrawn | kPredicted),
    terms(2, X | M | kDrawn | kPredicted),
    terms(1, X | M | H),
    terms(2, X | M | H),  // Heun, multistep
    terms(2, X | M | H | kPredicted),
    terms(3, X | M | H | kPredicted),
};

// With elementwise coefficients: DDPM with a learned variance; inpainting.
constexpr uint32_t kElementwiseTerms[] = {
    terms(1, X | M | Scaled | kDrawn),
    terms(2, X | M | Scaled | kDrawn),
    terms(1, X | M | Scaled | kDrawn | kPredicted),
    terms(2, X | M | Scaled | kDrawn | kPredicted),
    terms(1, X | M | Blended | kDrawn),
    terms(2, X | M | Blended | kDrawn),
    terms(1, X | M | Blended | kDrawn | kPredicted),
    terms(2, X | M | Blended | kDrawn | kPredicted),
    terms(3, X | M | U | Blended | kDrawn),
};

// Where the noise's index has another order than memory (channels_last).
constexpr uint32_t kMapPermutedTerms[] = {
    terms(1, kDrawn), terms(1, X | kDrawn), terms(2, X | kDrawn), terms(1, X | M | kDrawn), terms(2, X | M | kDrawn),
};

// Residuals: m against noise, data or both, or against a given target; with a mask or without; and those of consistency
// models, where h is the target's output, the derivative, or the teacher's state or output.
constexpr uint32_t kReduceTerms[] = {
    residual(M | kDrawn),         residual(X | M | kDrawn),    residual(X | M),
    residual(X | M | H),          residual(M | kDrawn | Mask), residual(X | M | kDrawn | Mask),
    residual(X | M | Mask),       residual(X | M | Z),         residual(X | M | H | H1),
    residual(X | M | H | kDrawn), residual(M | H | H1),        residual(X | M | H | H1 | kDrawn),
};

constexpr uint32_t kReducePermutedTerms[] = {residual(M | kDrawn), residual(X | M | kDrawn)};

// Types of a known pass. mixed: a float32 state and a network's output of 16 bits; h and further outputs of either.
// half: 16 bits everywhere. bf16, f16: all of that one type, of passes that draw; a mix of both is no known pass there.
enum class Types { f32, mixed, half, bf16, f16 };

constexpr bool are_halves(Types types) { return types == Types::half || types == Types::bf16 || types == Types::f16; }

// Elements of a vector: 16 bytes of the narrowest state.
constexpr int vector_of(Types types) { return are_halves(types) ? 8 : 4; }

// A pass's terms and outputs, asked at run time; room for kMostHs of h and kMostOuts outputs.
template <int kMostHs, int kMostOuts>
struct Asked {
  static constexpr bool kCopied = false;  // the row's cells into registers
  static constexpr int kHs = kMostHs, kOuts = kMostOuts;
  static constexpr bool kScales = false;
  static constexpr int kUnroll = 1;

  template <typename Pass>
  static __device__ bool has(const Pass& pass, int k) {
    return (pass.given >> k & 1u) != 0;
  }
  template <typename Pass>
  static __device__ bool use_pred(const Pass& pass) {
    return pass.use_pred;
  }
  template <typename Pass>
  static __device__ int n_out(const Pass& pass) {
    return pass.n_out;
  }
};

// The types of a pass of whole aligned vectors, with normal noise; kReduced: its output is a residual.
template <Types kTypes, bool kReduced>
struct Fixed {
  static constexpr bool kWhole = true;

  template <typename Pass>
  static __device__ DType dtype(const Pass& pass, int k) {
    if (kTypes == Types::f32 && k != kMask) return DType::f32;
    if (kTypes == Types::bf16 && k != kMask) return DType::bf16;
    if (kTypes == Types::f16 && k != kMask) return DType::f16;
    if (kTypes == Types::half && k != kMask) return sixteen(pass.dtype[k]);
    const bool of_network = k == kM || k == kMUncond || k == kV || (k == kInputs && kReduced);
    if (of_network) return sixteen(pass.dtype[k]);
    if (k >= kH0 && k <= kH2) return pass.dtype[k] == DType::f32 ? DType::f32 : sixteen(pass.dtype[k]);
    return k < kMask || k == kKnownData || k == kInputs ? DType::f32 : pass.dtype[k];
  }

 private:
  // Of two types, said so that the compiler knows the size.
  static __device__ DType sixteen(DType dtype) { return dtype == DType::bf16 ? DType::bf16 : DType::f16; }
};

// Any pass, with elementwise coefficients or without.
template <int kMostHs, int kMostOuts, bool kDraws, bool kHasElementwise = false>
struct Any : Asked<kMostHs, kMostOuts> {
  static constexpr bool kWhole = false, kDraw = kDraws, kElementwise = kHasElementwise;
  static constexpr int blocks(bool) { return 1; }

  template <typename Pass>
  static __device__ DType dtype(const Pass& pass, int k) {
    return pass.dtype[k];
  }
};

// Any pass of these types.
template <int kMostHs, int kMostOuts, bool kDraws, Types kTypes, bool kReduced>
struct Typed : Asked<kMostHs, kMostOuts>, Fixed<kTypes, kReduced> {
  static constexpr bool kDraw = kDraws, kElementwise = false;
  static constexpr int blocks(bool) { return kMostHs > 1 && kDraws ? 2 : 3; }
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kMostResident = 4;  // of 256 threads: Turing's multiprocessors hold 1024
#else
constexpr int kMostResident = 5;
#endif

template <uint32_t kTerms, Types kTypes>
struct Known : Fixed<kTypes, (kTerms & kResidual) != 0> {
  static constexpr bool kCopied = true, kDraw = (kTerms & kDrawn) != 0;
  static constexpr bool kElementwise = (kTerms & (1u << kV | 1u << kKnownData)) != 0;
  static constexpr int kHs = (kTerms & H1) != 0 ? 2 : (kTerms & H) != 0 ? 1 : 0;
  static constexpr int kOuts = static_cast<int>(kTerms >> kOutsShift);
  static constexpr int kInputsGiven = ((kTerms & X) != 0) + ((kTerms & M) != 0) + ((kTerms & U) != 0) + kHs +
                                      ((kTerms & Z) != 0) + ((kTerms & Mask) != 0) + ((kTerms & 1u << kV) != 0) +
                                      ((kTerms & 1u << kKnownData) != 0);
  // One term scaled into one output: nothing to do where that is the term itself and the scale 1.
  static constexpr bool kScales = kTerms == terms(1, X);
  // Vectors that a thread has in flight, as they were fastest on an H100.
  static constexpr int kUnroll = kDraw                    ? (!are_halves(kTypes) && kInputsGiven + kOuts <= 2 ? 2 : 1)
                                 : kInputsGiven == 1      ? 4
                                 : kTypes == Types::mixed ? 2
                                                          : 1;
  // Blocks that a multiprocessor is to hold: what hides the latency of the normals' arithmetic, short of spilling. What
  // a thread holds is counted in vectors; a mask beside halves takes words of four bytes; of a tile there are two
  // vectors, in wider types four.
  static constexpr int blocks(bool tile) {
    const int held = kInputsGiven + kOuts + ((kTerms & kPredicted) != 0 ? 2 : 0) +
                     ((kTerms & Mask) != 0 && are_halves(kTypes) ? 2 : 0) +
                     (!tile                ? 0
                      : are_halves(kTypes) ? 1
                                           : 1 + kInputsGiven);
    return !kDraw ? 1 : held > 7 ? 2 : held > 5 ? 3 : held > 3 || kUnroll > 1 ? 4 : kMostResident;
  }

  template <typename Pass>
  static __device__ constexpr bool has(const Pass&, int k) {
    return (kTerms >> k & 1u) != 0;
  }
  template <typename Pass>
  static __device__ constexpr bool use_pred(const Pass&) {
    return (kTerms & kPredicted) != 0;
  }
  template <typename Pass>
  static __device__ constexpr int n_out(const Pass&) {
    return kOuts;
  }
};

}  // namespace
}  // namespace genkern
