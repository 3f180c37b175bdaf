// stat on the CPU: the row's outputs of a block, then sums over them, or the first of them handed on.
#include "block.h"
#include "stat.h"
#include "sum_block.h"

namespace genkern {
namespace GENKERN_ISA {
namespace {

// Calls body(task, span, buffers) for every block of tasks [begin, end), with the row's outputs in buffers.out.
template <typename Acc, typename Body>
void for_each_output(const MapArgs& map, const Walk& walk, int64_t begin, int64_t end, Body body) {
  Plan plan;
  make_plan(map, walk, plan);
  Buffers<Acc> buffers;
  const auto with_row = [&](int64_t task, const Span& span, const Acc* cells, float*) {
    RowPass<Acc> pass;
    set_inputs<Acc>(map, plan, span, cells, nullptr, buffers, pass);
    for (int j = 0; j < map.n_out; ++j) pass.out[j] = {buffers.out[j], dtype_of<Acc>(), false};
    apply<Acc>(pass, false, span.count);
    body(task, span, buffers);
  };
  for_each_block<Acc>(map, walk, plan, kBlock, begin, end, buffers.noise, with_row);
}

template <typename Acc>
void add_moments(const Acc (*out)[kBlock], int n_out, int count, double* sums) {
  for (int j = 0; j < n_out; ++j)
    *sums++ += sum_block<double>(count, [=](int i) { return static_cast<double>(out[j][i]); });
  for (int j = 0; j < n_out; ++j)
    for (int k = j; k < n_out; ++k)
      *sums++ += sum_block<double>(
          count, [=](int i) { return static_cast<double>(out[j][i]) * static_cast<double>(out[k][i]); });
}

template <typename Acc>
double error_of(const Acc (*out)[kBlock], int n_out, int count, Acc atol, Acc rtol) {
  return sum_block<double>(count, [=](int i) {
    const Acc first = n_out > 1 ? out[1][i] : Acc(0), second = n_out > 2 ? out[2][i] : Acc(0);
    const auto r = static_cast<double>(scaled_error(out[0][i], first, second, atol, rtol));
    return r * r;
  });
}

template <typename Acc>
void stat_typed(const StatCpu& cpu, int64_t begin, int64_t end) {
  const StatArgs& args = *cpu.args;
  const int n_out = args.map.n_out, n_sums = sums_of(args.kind, n_out);
  for (int64_t k = begin * n_sums; k < end * n_sums; ++k) cpu.partials[k] = 0.0;
  const auto add = [&](int64_t task, const Span& span, const Buffers<Acc>& buffers) {
    double* sums = cpu.partials + task * n_sums;
    if (args.kind == Stat::moments) {
      add_moments(buffers.out, n_out, span.count, sums);
    } else {
      sums[0] += error_of(buffers.out, n_out, span.count, static_cast<Acc>(args.atol), static_cast<Acc>(args.rtol));
    }
  };
  for_each_output<Acc>(args.map, *cpu.walk, begin, end, add);
}

template <typename Acc>
void values_typed(const ValuesCpu& cpu, int64_t begin, int64_t end) {
  for_each_output<Acc>(*cpu.map, *cpu.walk, begin, end, [&](int64_t, const Span& span, const Buffers<Acc>& buffers) {
    cpu.take(cpu.context, span.b, buffers.out[0], span.count);
  });
}

}  // namespace

void stat_tasks(const StatCpu& args, int64_t begin, int64_t end) {
  args.args->map.f64 ? stat_typed<double>(args, begin, end) : stat_typed<float>(args, begin, end);
}

void value_tasks(const ValuesCpu& args, int64_t begin, int64_t end) {
  args.map->f64 ? values_typed<double>(args, begin, end) : values_typed<float>(args, begin, end);
}

}  // namespace GENKERN_ISA
}  // namespace genkern
