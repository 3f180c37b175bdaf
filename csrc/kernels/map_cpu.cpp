// map on the CPU: each task applies the row to one chunk of one sample.
#include "block.h"

namespace genkern {
namespace GENKERN_ISA {
namespace {

template <typename Acc>
void map_typed(const MapCpu& cpu, int64_t begin, int64_t end) {
  const MapArgs& args = *cpu.args;
  const Walk& walk = *cpu.walk;
  Plan plan;
  make_plan(args, walk, plan);
  Buffers<Acc> buffers;
  const auto write = [&](auto& pass, const Span& span, const Acc* cells, float* z) {
    set_inputs(args, plan, span, cells, z, buffers, pass);
    for (int j = 0; j < args.n_out; ++j)
      pass.out[j] = target(plan, span, j, args.out[j], (cpu.streamed >> j & 1u) != 0, buffers.out[j]);
    apply<Acc>(pass, z != nullptr, span.count);
    for (int j = 0; j < args.n_out; ++j)
      if (!plan.dense[kInputs + j]) store(span, kInputs + j, args.out[j], buffers.out[j]);
  };
  const auto body = [&](int64_t, const Span& span, const Acc* cells, float* z) {
    RowPass<Acc> pass;
    write(pass, span, cells, z);
  };
  const auto elementwise = [&](int64_t, const Span& span, const Acc* cells, float* z) {
    ElementwisePass<Acc> pass;
    set_elementwise(args, plan, span, buffers, pass);
    write(pass, span, cells, z);
  };
  const auto each = [&](auto of_block) {
    for_each_block<Acc>(args, walk, plan, plan.block, begin, end, buffers.noise, of_block);
  };
  args.elementwise() ? each(elementwise) : each(body);
  if (cpu.streamed != 0) end_streams();
}

}  // namespace

void map_tasks(const MapCpu& args, int64_t begin, int64_t end) {
  args.args->f64 ? map_typed<double>(args, begin, end) : map_typed<float>(args, begin, end);
}

}  // namespace GENKERN_ISA
}  // namespace genkern
