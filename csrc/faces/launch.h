// What the eager face (csrc/python/eager.cpp) asks of the torch library: to run a call on torch's threads, or on the
// current stream of a CUDA device. The op genkern::launcher hands its address over.
#pragma once

#include "../kernels/kernels.h"

namespace genkern {

struct Launcher {
  size_t map_bytes = sizeof(MapArgs), reduce_bytes = sizeof(ReduceArgs);  // both halves are of one build
  // False where nothing was run: the caller then takes the way through torch, which words the error.
  bool (*map)(const MapArgs& args, bool cuda, int32_t device) noexcept;
  bool (*reduce)(ReduceArgs& args, bool cuda, int32_t device) noexcept;  // brings its own workspace
};

}  // namespace genkern
