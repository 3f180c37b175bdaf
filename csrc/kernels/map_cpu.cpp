// map on the CPU: each task applies the row to one chunk of one sample.
#include "block.h"

namespace genkern {
namespace GENKERN_ISA {
namespace {

// Whether the output is the noise of every element, in C order and whole quads: it is drawn where it lies. Through a
// buffer and a row it takes 1.2 times as long.
bool is_noise_alone(const MapArgs& args, const Walk& walk, const Plan& plan) {
  for (const Array& array : args.in)
    if (array.data != nullptr) return false;
  const bool one = args.n_out == 1 && !args.rows.by_sample() && args.rows.base[kFirstOut + kOutZ] == 1.0;
  const bool plain = one && !args.use_pred && !args.f64 && args.out[0].dtype == DType::f32;
  return plain && args.noise.draw_kind != Draw::none && walk.n % 4 == 0 && plan.dense[kIndex] && plan.dense[kInputs];
}

void draw_tasks(const MapArgs& args, const Walk& walk, int64_t begin, int64_t end) {
  const int64_t chunks = chunks_per_sample(walk.n);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / chunks, first = task % chunks * kChunk;
    const SampleNoise noise = sample_noise(args.noise, b);
    const int quads = static_cast<int>(std::min(kChunk, walk.n - first) / 4);
    float* to = static_cast<float*>(args.out[0].data) + b * walk.batch_stride[kInputs] + first;
    draw_quads(noise, static_cast<uint64_t>(first) / 4, quads, to);
  }
}

template <typename Acc>
void map_typed(const MapCpu& cpu, int64_t begin, int64_t end) {
  const MapArgs& args = *cpu.args;
  const Walk& walk = *cpu.walk;
  Plan plan;
  make_plan(args, walk, plan);
  if (is_noise_alone(args, walk, plan)) return draw_tasks(args, walk, begin, end);
  Buffers<Acc> buffers;
  const auto write = [&](auto& pass, const Span& span, const Acc* cells, float* z) {
    set_inputs(args, plan, span, cells, z, buffers, pass);
    for (int j = 0; j < args.n_out; ++j)
      pass.out[j] = target(plan, span, j, args.out[j], (cpu.streamed >> j & 1u) != 0, buffers.out[j]);
    apply<Acc>(pass, z != nullptr, span.count);
    for (int j = 0; j < args.n_out; ++j)
      if (!plan.dense[kInputs + j]) store(span, kInputs + j, args.out[j], buffers.out[j]);
  };
  const bool scales = args.scales_in_place();
  const auto body = [&](int64_t, const Span& span, const Acc* cells, float* z) {
    if (scales && cells[kFirstOut + kOutX] == Acc(1)) return;
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
