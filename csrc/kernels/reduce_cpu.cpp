// reduce on the CPU: r = row(x, m, ...) times the mask, written, and sum rho(r) of each chunk.
//
// A block is summed in 16 lanes whatever the vector width, the lanes in a fixed tree, blocks and chunks in order in
// double: the sums depend neither on the instruction set nor on the number of threads.
#include "block.h"

namespace genkern {
namespace GENKERN_ISA {
namespace {

constexpr int kLanes = 16;

template <typename Acc, typename Term>
double sum_block(const Acc* values, int count, Term term) {
  Acc lanes[kLanes] = {};
  int i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int l = 0; l < kLanes; ++l) lanes[l] += term(values[i + l]);
  for (int l = 0; i + l < count; ++l) lanes[l] += term(values[i + l]);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int l = 0; l < width; ++l) lanes[l] += lanes[l + width];
  return static_cast<double>(lanes[0]);
}

template <typename Acc>
void reduce_typed(const ReduceCpu& args, int64_t begin, int64_t end) {
  const MapArgs& map = *args.map;
  Buffers<Acc> buffers;
  for (int64_t task = begin; task < end; ++task) args.partials[2 * task] = args.partials[2 * task + 1] = 0.0;
  for_each_block<Acc>(map, *args.walk, begin, end,
                      [&](int64_t task, const Span& span, const Acc* cells, const SampleNoise& noise) {
    const Acc* result[kMaxOuts];
    apply_row(map, span, cells, noise, buffers, static_cast<Acc*>(nullptr), result);
    Acc* r = buffers.out[0];
    double elements = span.count;
    if (map.in[kMask].data != nullptr) {
      const Acc* mask = load(span, kMask, map.in[kMask], buffers.in[kMask]);
      for (int i = 0; i < span.count; ++i) r[i] = mask[i] != Acc(0) ? mask[i] * r[i] : Acc(0);
      elements = sum_block(mask, span.count, [](Acc v) { return v; });
    }
    double sum;
    if (args.rho == Rho::square) {
      sum = sum_block(r, span.count, [](Acc v) { return v * v; });
    } else {
      sum = sum_block(r, span.count, [](Acc v) { return v < Acc(0) ? -v : v; });
      for (int i = 0; i < span.count; ++i) r[i] = r[i] > Acc(0) ? Acc(1) : (r[i] < Acc(0) ? Acc(-1) : r[i]);
    }
    store(span, kInputs, map.out[0], r);
    args.partials[2 * task] += sum;
    args.partials[2 * task + 1] += elements;
  });
}

}  // namespace

void reduce_tasks(const ReduceCpu& args, int64_t begin, int64_t end) {
  args.map->f64 ? reduce_typed<double>(args, begin, end) : reduce_typed<float>(args, begin, end);
}

}  // namespace GENKERN_ISA
}  // namespace genkern
