// The CPU kernels' entries, one namespace an instruction set: the *_cpu.cpp files are compiled once for each, with
// GENKERN_ISA naming it. Everything else those files use has internal linkage, so that the linker never picks a
// function compiled for a newer CPU.
#pragma once

#include "layout.h"
#include "stat.h"

namespace genkern {

constexpr int64_t kChunk = 8192;  // elements a task; the unit of a reduction's fixed tree, whatever the threads

static inline int64_t chunks_per_sample(int64_t n) { return (n + kChunk - 1) / kChunk; }

struct MapCpu {
  const MapArgs* args;
  const Walk* walk;
  uint32_t streamed;  // streamed.h, by output
};

struct ReduceCpu {
  const ReduceArgs* args;
  const Walk* walk;
  double* partials;  // [tasks, 2]: sum of rho, unmasked elements
};

struct StatCpu {
  const StatArgs* args;
  const Walk* walk;
  double* partials;  // [tasks, sums_of()]
};

// Hands the first output of every block to take(context, b, values, count), values of the arithmetic's type.
struct ValuesCpu {
  const MapArgs* map;
  const Walk* walk;
  void* context;
  void (*take)(void* context, int64_t b, const void* values, int count);
};

// Task k is chunk k % chunks of sample k / chunks.
namespace scalar {
void map_tasks(const MapCpu& args, int64_t begin, int64_t end);
void reduce_tasks(const ReduceCpu& args, int64_t begin, int64_t end);
void stat_tasks(const StatCpu& args, int64_t begin, int64_t end);
void value_tasks(const ValuesCpu& args, int64_t begin, int64_t end);
}  // namespace scalar
namespace avx2 {
void map_tasks(const MapCpu& args, int64_t begin, int64_t end);
void reduce_tasks(const ReduceCpu& args, int64_t begin, int64_t end);
void stat_tasks(const StatCpu& args, int64_t begin, int64_t end);
void value_tasks(const ValuesCpu& args, int64_t begin, int64_t end);
}  // namespace avx2
namespace avx512 {
void map_tasks(const MapCpu& args, int64_t begin, int64_t end);
void reduce_tasks(const ReduceCpu& args, int64_t begin, int64_t end);
void stat_tasks(const StatCpu& args, int64_t begin, int64_t end);
void value_tasks(const ValuesCpu& args, int64_t begin, int64_t end);
}  // namespace avx512

// The kernels of one instruction set.
struct Isa {
  const char* name;
  void (*map)(const MapCpu&, int64_t, int64_t);
  void (*reduce)(const ReduceCpu&, int64_t, int64_t);
  void (*stat)(const StatCpu&, int64_t, int64_t);
  void (*values)(const ValuesCpu&, int64_t, int64_t);
  bool supported;
};

// That in use.
const Isa* chosen_isa();

// Below this a second thread costs more than it brings.
constexpr int64_t kGrainElements = 4 * kChunk;

static inline int64_t grain(const Walk& walk) {
  const int64_t elements = walk.n < kChunk ? walk.n : kChunk;
  return (kGrainElements + elements - 1) / elements;
}

}  // namespace genkern
