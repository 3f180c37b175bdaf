// map on the CPU: each task applies the row to one chunk of one sample.
#include "block.h"

namespace genkern {
namespace GENKERN_ISA {
namespace {

template <typename Acc>
void map_typed(const MapArgs& args, const Walk& walk, int64_t begin, int64_t end) {
  Buffers<Acc> buffers;
  const int last = args.n_out - 1;
  const bool in_place = walk.linear && args.out[last].dtype == dtype_of<Acc>();
  for_each_block<Acc>(args, walk, begin, end,
                      [&](int64_t, const Span& span, const Acc* cells, const SampleNoise& noise) {
                        Acc* direct = nullptr;
                        if (in_place)
                          direct = static_cast<Acc*>(args.out[last].data) + linear_offset(span, kInputs + last);
                        const Acc* result[kMaxOuts];
                        apply_row(args, span, cells, noise, buffers, direct, result);
                        for (int j = 0; j < args.n_out; ++j)
                          if (result[j] != direct) store(span, kInputs + j, args.out[j], result[j]);
                      });
}

// Whether every array is bfloat16 and the row a plain sum: applied where the arrays lie, in two thirds of the time that
// buffers between take (0.20 against 0.31 ns an element for a DDIM step, two AVX-512 threads).
bool plain_bf16(const MapArgs& args, const Walk& walk) {
  if (!walk.linear || args.f64 || args.use_pred || args.in[kMUncond].data != nullptr) return false;
  if (args.noise.draw_kind != Draw::none || args.n_out != 1 || args.out[0].dtype != DType::bf16) return false;
  for (const Input k : kOrder)
    if (args.in[k].data != nullptr && args.in[k].dtype != DType::bf16) return false;
  return true;
}

void map_bf16(const MapArgs& args, const Walk& walk, int64_t begin, int64_t end) {
  for_each_block<float>(args, walk, begin, end, [&](int64_t, const Span& span, const float* cells, const SampleNoise&) {
    float coefficients[kMaxTerms];
    const Bf16* terms[kMaxTerms];
    int n = 0;
    for (int t = 0; t < kMaxTerms - 1; ++t) {
      const Input k = kOrder[t];
      if (args.in[k].data == nullptr) continue;
      coefficients[n] = cells[kFirstOut + kTermCell[t]];
      terms[n++] = static_cast<const Bf16*>(args.in[k].data) + linear_offset(span, k);
    }
    Bf16* out = static_cast<Bf16*>(args.out[0].data) + linear_offset(span, kInputs);
    combine(n, coefficients, terms, out, span.count);
  });
}

}  // namespace

void map_tasks(const MapArgs& args, const Walk& walk, int64_t begin, int64_t end) {
  if (plain_bf16(args, walk)) return map_bf16(args, walk, begin, end);
  args.f64 ? map_typed<double>(args, walk, begin, end) : map_typed<float>(args, walk, begin, end);
}

}  // namespace GENKERN_ISA
}  // namespace genkern
