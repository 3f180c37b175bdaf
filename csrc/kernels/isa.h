// The CPU kernels' entries, one namespace an instruction set: the *_cpu.cpp files are compiled once for each, with
// GENKERN_ISA naming it. Everything else those files use has internal linkage, so that the linker never picks a
// function compiled for a newer CPU.
#pragma once

#include "layout.h"

namespace genkern {

constexpr int64_t kChunk = 8192;  // elements a task; the unit of a reduction's fixed tree, whatever the threads

static inline int64_t chunks_per_sample(int64_t n) { return (n + kChunk - 1) / kChunk; }

struct ReduceCpu {
  const ReduceArgs* args;
  const Walk* walk;
  double* partials;  // [tasks, 2]: sum of rho, unmasked elements
};

// Task k is chunk k % chunks of sample k / chunks.
namespace scalar {
void map_tasks(const MapArgs& args, const Walk& walk, int64_t begin, int64_t end);
void reduce_tasks(const ReduceCpu& args, int64_t begin, int64_t end);
}  // namespace scalar
namespace avx2 {
void map_tasks(const MapArgs& args, const Walk& walk, int64_t begin, int64_t end);
void reduce_tasks(const ReduceCpu& args, int64_t begin, int64_t end);
}  // namespace avx2
namespace avx512 {
void map_tasks(const MapArgs& args, const Walk& walk, int64_t begin, int64_t end);
void reduce_tasks(const ReduceCpu& args, int64_t begin, int64_t end);
}  // namespace avx512

}  // namespace genkern
