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

}  // namespace

void map_tasks(const MapArgs& args, const Walk& walk, int64_t begin, int64_t end) {
  args.f64 ? map_typed<double>(args, walk, begin, end) : map_typed<float>(args, walk, begin, end);
}

}  // namespace GENKERN_ISA
}  // namespace genkern
