// Enough of CUDA's language and runtime to run the kernels' sources on a CPU, so that their indexing, row loading and
// reductions are tested where there is no GPU. A block's threads are fibers; __syncthreads switches between them.
// It says nothing of speed, of memory coalescing or of races between warps: tests marked `cuda` do, on a GPU.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __grid_constant__
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};
struct float4 {
  float x, y, z, w;
};
struct double2 {
  double x, y;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }

inline float __uint_as_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline double __hiloint2double(int hi, int lo) {
  const uint64_t u = static_cast<uint64_t>(static_cast<uint32_t>(hi)) << 32 | static_cast<uint32_t>(lo);
  double d;
  std::memcpy(&d, &u, 8);
  return d;
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}

// Fibers switch at barriers alone: nothing comes between a read and a write.
template <typename T>
T atomicAdd(T* to, T value) {
  const T before = *to;
  *to += value;
  return before;
}
template <typename T>
T atomicMax(T* to, T value) {
  const T before = *to;
  if (value > before) *to = value;
  return before;
}

namespace emulation {

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(64 << 10);
  bool done = false;
};

inline ucontext_t scheduler;
inline std::vector<Fiber> fibers;
inline unsigned current;
inline const std::function<void()>* body;

inline void run_fiber() {
  (*body)();
  fibers[current].done = true;
}

}  // namespace emulation

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

inline void __syncthreads() { swapcontext(&emulation::fibers[emulation::current].context, &emulation::scheduler); }
inline void __syncwarp(unsigned = 0) { __syncthreads(); }

// A number of one lane, where all lanes have the same: fibers do not exchange any.
inline uint32_t __shfl_sync(unsigned, uint32_t value, int) { return value; }

namespace emulation {

// kernel<<<grid, block>>>: blocks in order, the threads of one in turns from barrier to barrier.
inline void launch(dim3 grid, dim3 block, const std::function<void()>& kernel) {
  body = &kernel;
  gridDim = grid, blockDim = block;
  const unsigned threads = block.x * block.y;
  if (fibers.size() < threads) fibers.resize(threads);
  for (unsigned b = 0; b < grid.x * grid.y * grid.z; ++b) {
    blockIdx = dim3(b % grid.x, b / grid.x % grid.y, b / (grid.x * grid.y));
    for (unsigned t = 0; t < threads; ++t) {
      Fiber& fiber = fibers[t];
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.data();
      fiber.context.uc_stack.ss_size = fiber.stack.size();
      fiber.context.uc_link = &scheduler;
      fiber.done = false;
      makecontext(&fiber.context, run_fiber, 0);
    }
    for (bool running = true; running;) {
      running = false;
      for (unsigned t = 0; t < threads; ++t) {
        if (fibers[t].done) continue;
        current = t;
        threadIdx = dim3(t % block.x, t / block.x);
        swapcontext(&scheduler, &fibers[t].context);
        running = true;
      }
    }
  }
}

}  // namespace emulation
