// The CPU kernels' front: the walk, the instruction set, the threads, and the last step of a reduction.
#include <atomic>
#include <cstring>

#include "isa.h"
#include "rows.h"
#include "streamed.h"

namespace genkern {
namespace {

// The widest last.
const Isa* isa_table(int* count) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  static const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  static const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  static const Isa table[] = {
      {"scalar", scalar::map_tasks, scalar::reduce_tasks, scalar::stat_tasks, scalar::value_tasks, true},
      {"avx2", avx2::map_tasks, avx2::reduce_tasks, avx2::stat_tasks, avx2::value_tasks, has_avx2},
      {"avx512", avx512::map_tasks, avx512::reduce_tasks, avx512::stat_tasks, avx512::value_tasks, has_avx512}};
#else
  static const Isa table[] = {
      {"scalar", scalar::map_tasks, scalar::reduce_tasks, scalar::stat_tasks, scalar::value_tasks, true}};
#endif
  *count = sizeof table / sizeof table[0];
  return table;
}

std::atomic<const Isa*>& chosen() {
  static std::atomic<const Isa*> isa = [] {
    int count;
    const Isa* table = isa_table(&count);
    const Isa* best = table;
    for (int i = 0; i < count; ++i)
      if (table[i].supported) best = table + i;
    return best;
  }();
  return isa;
}

struct MapContext {
  MapCpu args;
  const Isa* isa;
};

struct ReduceContext {
  ReduceCpu args;
  const Isa* isa;
};

}  // namespace

const Isa* chosen_isa() { return chosen().load(); }

const char* cpu_isa() { return chosen_isa()->name; }

bool select_cpu_isa(const char* name) {
  int count;
  const Isa* table = isa_table(&count);
  for (int i = 0; i < count; ++i) {
    if (table[i].supported && std::strcmp(table[i].name, name) == 0) {
      chosen().store(table + i);
      return true;
    }
  }
  return false;
}

void map_cpu(const MapArgs& args, const Parallel& parallel) {
  const Walk walk = make_walk(args, /*keep_samples=*/false);
  if (walk.batch == 0 || walk.n == 0) return;
  MapContext context{{&args, &walk, streamed_outputs(args)}, chosen_isa()};
  parallel.run(walk.batch * chunks_per_sample(walk.n), grain(walk), &context, [](void* c, int64_t begin, int64_t end) {
    const auto* context = static_cast<const MapContext*>(c);
    context->isa->map(context->args, begin, end);
  });
}

size_t reduce_workspace_cpu(const MapArgs& args) {
  const Walk walk = make_walk(args, /*keep_samples=*/true);
  return static_cast<size_t>(walk.batch * chunks_per_sample(walk.n)) * 2 * sizeof(double);
}

void reduce_cpu(const ReduceArgs& args, const Parallel& parallel) {
  const Walk walk = make_walk(args.map, /*keep_samples=*/true);
  const int64_t chunks = chunks_per_sample(walk.n);
  auto* partials = static_cast<double*>(args.workspace);
  if (walk.batch > 0 && walk.n > 0) {
    ReduceContext context{{&args, &walk, partials}, chosen_isa()};
    parallel.run(walk.batch * chunks, grain(walk), &context, [](void* c, int64_t begin, int64_t end) {
      const auto* context = static_cast<const ReduceContext*>(c);
      context->isa->reduce(context->args, begin, end);
    });
  }
  const auto write = [&](void* to, int64_t at, double number) {
    if (args.map.f64)
      static_cast<double*>(to)[at] = number;
    else
      static_cast<float*>(to)[at] = static_cast<float>(number);
  };
  double total = 0.0;
  for (int64_t b = 0; b < walk.batch; ++b) {
    double sums[2] = {};
    for (int64_t c = 0; c < chunks; ++c)
      for (int which = 0; which < 2; ++which) sums[which] += partials[2 * (b * chunks + c) + which];
    for (int which = 0; args.sums != nullptr && which < 2; ++which) write(args.sums, 2 * b + which, sums[which]);
    total += weight_of(args.weight, b) * sums[0];
  }
  if (args.total != nullptr) write(args.total, 0, args.total_scale * total);
}

}  // namespace genkern
