// reduce on the CPU: r = row(x, m, ...); scale * weight[b] * mask * r (with sign(r) for absolute values), times m's
// coefficient where asked for, is written, and mask * rho(r) summed over each chunk.
//
// Blocks and chunks are added in order in double, so that the sums depend neither on the instruction set nor on the
// number of threads.
#include "block.h"
#include "sum_block.h"

namespace genkern {
namespace GENKERN_ISA {
namespace {

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
void reduce_typed(const ReduceCpu& task_args, int64_t begin, int64_t end) {
  const ReduceArgs& args = *task_args.args;
  const MapArgs& map = args.map;
  double* const partials = task_args.partials;
  Plan plan;
  make_plan(map, *task_args.walk, plan);
  Buffers<Acc> buffers;
  for (int64_t task = begin; task < end; ++task) partials[2 * task] = partials[2 * task + 1] = 0.0;
  auto body = [&](int64_t task, const Span& span, const Acc* cells, float* z) {
    RowPass<Acc> pass;
    set_inputs(map, plan, span, cells, z, buffers, pass);
    Acc* r = buffers.out[0];
    pass.out[0] = {r, dtype_of<Acc>(), false};
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
    partials[2 * task] += sum;
    partials[2 * task + 1] += elements;
    if (map.out[0].data == nullptr) return;
    const auto weight = static_cast<Acc>(args.scale * weight_of(args.weight, span.b));
    const Acc scale = args.by_m ? weight * cells[kFirstOut + kOutM] : weight;
    if (scale != Acc(1))
      for (int i = 0; i < span.count; ++i) r[i] = scale * r[i];
    store(span, kInputs, map.out[0], r);
  };
  for_each_block<Acc>(map, *task_args.walk, plan, kBlock, begin, end, buffers.noise, body);
}

}  // namespace

void reduce_tasks(const ReduceCpu& args, int64_t begin, int64_t end) {
  args.args->map.f64 ? reduce_typed<double>(args, begin, end) : reduce_typed<float>(args, begin, end);
}

}  // namespace GENKERN_ISA
}  // namespace genkern
