// Kernels run on torch's threads, or on the current stream of a CUDA device, with torch's memory; and the table of them
// that the eager face calls.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <utility>
#include <vector>

#include "../faces/call.h"
#include "../faces/launch.h"

// torch 2.13 gave the check of a shim call this name; the older headers have it as TORCH_ERROR_CODE_CHECK only.
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

#ifdef GENKERN_WITH_CUDA
// Weak, so that the library also loads under a torch without CUDA.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream)
    __attribute__((weak));
#endif

namespace genkern {
namespace {

using torch::stable::Tensor;

const Parallel kTorchThreads{[](int64_t count, int64_t grain, void* context, void (*body)(void*, int64_t, int64_t)) {
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { body(context, begin, end); });
}};

// Runs cpu() or cuda(stream), the latter on the device and its current stream.
template <typename Cpu, typename Cuda>
void run_on(bool on_cuda, [[maybe_unused]] int32_t device, Cpu cpu, [[maybe_unused]] Cuda cuda) {
  if (!on_cuda) return cpu();
#ifdef GENKERN_WITH_CUDA
  expect(aoti_torch_get_current_cuda_stream != nullptr, "x: this torch has no CUDA");
  torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const char* error = cuda(stream);
  expect(error == nullptr, "genkern: the kernel could not be launched: ", error);
#else
  expect(false, "x: is on a CUDA device, but genkern was built without CUDA; rebuild it where nvcc is found");
#endif
}

void launch_map(const MapArgs& args, bool on_cuda, int32_t device) {
  run_on(
      on_cuda, device, [&] { map_cpu(args, kTorchThreads); },
      [&]([[maybe_unused]] void* stream) -> const char* {
#ifdef GENKERN_WITH_CUDA
        return map_cuda(args, stream);
#else
        return nullptr;
#endif
      });
}

// Memory of a call: torch's on CUDA, where it is reused in the stream's order.
class Workspace {
 public:
  Workspace(size_t bytes, bool on_cuda) {
    if (!on_cuda) {
      host_.resize(bytes / sizeof(double) + 1);
      return;
    }
    const int64_t count = static_cast<int64_t>(bytes / sizeof(double) + 1), step = 1;
    AtenTensorHandle found = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(1, &count, &step, aoti_torch_dtype_float64(), aoti_torch_device_type_cuda(),
                                 torch::stable::accelerator::getCurrentDeviceIndex(), &found));
    device_ = Tensor(found);
  }
  void* data() { return device_ ? device_->data_ptr() : host_.data(); }

 private:
  std::vector<double> host_;
  std::optional<Tensor> device_;
};

size_t workspace_bytes(const MapArgs& args, [[maybe_unused]] bool on_cuda) {
#ifdef GENKERN_WITH_CUDA
  if (on_cuda) return reduce_workspace_cuda(args);
#endif
  return reduce_workspace_cpu(args);
}

const char* reduce_there(const ReduceArgs& args, [[maybe_unused]] bool on_cuda, [[maybe_unused]] void* stream) {
#ifdef GENKERN_WITH_CUDA
  if (on_cuda) return reduce_cuda(args, stream);
#endif
  reduce_cpu(args, kTorchThreads);
  return nullptr;
}

void launch_reduce(ReduceArgs& args, bool on_cuda, int32_t device) {
  const auto run = [&](void* stream) {
    Workspace workspace(workspace_bytes(args.map, on_cuda), on_cuda);
    args.workspace = workspace.data();
    return reduce_there(args, on_cuda, stream);
  };
  run_on(on_cuda, device, [&] { run(nullptr); }, run);
}

// The device of a tensor that has a kernel: whether it is a CUDA one, and its index.
std::pair<bool, int32_t> place(const Tensor& t) {
  expect(t.is_cpu() || t.is_cuda(), "x: expected a tensor on the CPU or on a CUDA device");
  return {t.is_cuda(), t.is_cuda() ? t.get_device_index() : 0};
}

template <typename Run>
bool succeeds(Run run) noexcept {
  try {
    run();
    return true;
  } catch (...) {
    return false;
  }
}

const Launcher kLauncher{sizeof(MapArgs), sizeof(ReduceArgs),
                         [](const MapArgs& args, bool cuda, int32_t device) noexcept {
                           return succeeds([&] { launch_map(args, cuda, device); });
                         },
                         [](ReduceArgs& args, bool cuda, int32_t device) noexcept {
                           return succeeds([&] { launch_reduce(args, cuda, device); });
                         }};

int64_t launcher() { return reinterpret_cast<int64_t>(&kLauncher); }

}  // namespace
}  // namespace genkern
