// stat on torch's threads, or on the current stream of a CUDA device, with torch's memory.
#pragma once

#include "../kernels/stat.h"
#include "launch.h"

namespace genkern {
namespace {

void launch_stat(StatArgs& args, bool on_cuda, int32_t device) {
  run_on(
      on_cuda, device,
      [&] {
        Workspace workspace(stat_workspace_cpu(args.map), false);
        args.workspace = workspace.data();
        stat_cpu(args, kTorchThreads);
      },
      [&]([[maybe_unused]] void* stream) -> const char* {
#ifdef GENKERN_WITH_CUDA
        Workspace workspace(stat_workspace_cuda(args.map), true);
        args.workspace = workspace.data();
        return stat_cuda(args, stream);
#else
        return nullptr;
#endif
      });
}

void launch_quantile(QuantileArgs& args, bool on_cuda, int32_t device) {
  run_on(
      on_cuda, device,
      [&] {
        Workspace workspace(quantile_workspace_cpu(args.map), false);
        args.workspace = workspace.data();
        quantile_cpu(args, kTorchThreads);
      },
      [&]([[maybe_unused]] void* stream) -> const char* {
#ifdef GENKERN_WITH_CUDA
        Workspace workspace(quantile_workspace_cuda(args.map), true);
        args.workspace = workspace.data();
        return quantile_cuda(args, stream);
#else
        return nullptr;
#endif
      });
}

}  // namespace
}  // namespace genkern
