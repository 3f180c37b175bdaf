// reduce on the CPU: r = row(x, m, ...); scale * mask * r (scale * mask * sign(r)) is written, and mask * rho(r) summed
// over each chunk.
//
// A block is summed in 16 lanes whatever the vector width, the lanes in a fixed tree, blocks and chunks in order in
// double: the sums depend neither on the instruction set nor on the number of threads.
#include "block.h"

namespace genkern {
namespace GENKERN_ISA {
namespace {

constexpr int kLanes = 16;

// The sum of term(i), i from 0 to count - 1.
template <typename Acc, typename Term>
double sum_block(int count, Term term) {
  Acc lanes[kLanes] = {};
  int i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int l = 0; l < kLanes; ++l) lanes[l] += term(i + l);
  for (int l = 0; i + l < count; ++l) lanes[l] += term(i + l);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int l = 0; l < width; ++l) lanes[l] += lanes[l + width];
  return static_cast<double>(lanes[0]);
}

template <typename Acc>
Acc absolute(Acc v) {
  return v < Acc(0) ? -v : v;
}

template <typename Acc>
Acc sign(Acc v) {
  return v > Acc(0) ? Acc(1) : (v < Acc(0) ? Acc(-1) : v);
}

// Sums rho of a block's residual and turns it into what is written: half of rho' for squares, rho' for absolute values.
template <typename Acc>
double sum_rho(Rho rho, Acc* r, int count) {
  if (rho == Rho::square) return sum_block<Acc>(count, [=](int i) { return r[i] * r[i]; });
  const double sum = sum_block<Acc>(count, [=](int i) { return absolute(r[i]); });
  for (int i = 0; i < count; ++i) r[i] = sign(r[i]);
  return sum;
}

// The same, weighted. Where the mask is 0 the residual does not count, whatever it is.
template <typename Acc>
double sum_rho_masked(Rho rho, const Acc* mask, Acc* r, int count) {
  for (int i = 0; i < count; ++i) r[i] = mask[i] != Acc(0) ? r[i] : Acc(0);
  double sum;
  if (rho == Rho::square) {
    sum = sum_block<Acc>(count, [=](int i) { return mask[i] * r[i] * r[i]; });
    for (int i = 0; i < count; ++i) r[i] = mask[i] * r[i];
  } else {
    sum = sum_block<Acc>(count, [=](int i) { return mask[i] * absolute(r[i]); });
    for (int i = 0; i < count; ++i) r[i] = mask[i] * sign(r[i]);
  }
  return sum;
}

template <typename Acc>
void reduce_typed(const ReduceCpu& args, int64_t begin, int64_t end) {
  const MapArgs& map = *args.map;
  Plan plan;
  make_plan(map, *args.walk, plan);
  Buffers<Acc> buffers;
  for (int64_t task = begin; task < end; ++task) args.partials[2 * task] = args.partials[2 * task + 1] = 0.0;
  auto body = [&](int64_t task, const Span& span, const Acc* cells, float* z) {
    RowPass<Acc> pass;
    set_inputs(map, plan, span, cells, z, buffers, pass);
    Acc* r = buffers.out[0];
    pass.out[0] = {r, dtype_of<Acc>()};
    apply<Acc>(pass, z != nullptr, span.count);
    double sum, elements = span.count;
    if (map.in[kMask].data != nullptr) {
      Acc* mask = buffers.in[kMask];
      load(span, kMask, map.in[kMask], mask);
      elements = sum_block<Acc>(span.count, [=](int i) { return mask[i]; });
      sum = sum_rho_masked(args.rho, mask, r, span.count);
    } else {
      sum = sum_rho(args.rho, r, span.count);
    }
    if (args.scale != 1.0) {
      const Acc scale = static_cast<Acc>(args.scale);
      for (int i = 0; i < span.count; ++i) r[i] = scale * r[i];
    }
    store(span, kInputs, map.out[0], r);
    args.partials[2 * task] += sum;
    args.partials[2 * task + 1] += elements;
  };
  for_each_block<Acc>(map, *args.walk, plan, kBlock, begin, end, buffers.noise, body);
}

}  // namespace

void reduce_tasks(const ReduceCpu& args, int64_t begin, int64_t end) {
  args.map->f64 ? reduce_typed<double>(args, begin, end) : reduce_typed<float>(args, begin, end);
}

}  // namespace GENKERN_ISA
}  // namespace genkern
