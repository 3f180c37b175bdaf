// torch's tensors as plain views, and new ones.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <optional>
#include <vector>

#include "../faces/call.h"
#include "launch.h"

namespace {

using genkern::Element;
using genkern::expect;
using genkern::View;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;

Element element_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return Element::f32;
    case ScalarType::Half: return Element::f16;
    case ScalarType::BFloat16: return Element::bf16;
    case ScalarType::Double: return Element::f64;
    case ScalarType::Bool: return Element::boolean;
    case ScalarType::Long: return Element::int64;
    default: return Element::other;
  }
}

ScalarType scalar_type(int64_t code) {
  switch (code) {
    case 0: return ScalarType::Float;
    case 1: return ScalarType::Half;
    case 2: return ScalarType::BFloat16;
    case 3: return ScalarType::Double;
    default: break;
  }
  expect(false, "out_dtypes: expected 0 (float32), 1 (float16), 2 (bfloat16) or 3 (float64), got ", code);
  return ScalarType::Float;
}

View view(const Tensor& t) {
  return {t.data_ptr(),
          element_of(t.scalar_type()),
          {t.is_cuda(), t.is_cuda() ? t.get_device_index() : 0},
          static_cast<int32_t>(t.dim()),
          t.sizes().data(),
          t.strides().data()};
}

genkern::MaybeView view(const MaybeTensor& t) { return t ? genkern::MaybeView(view(*t)) : std::nullopt; }

std::vector<View> view(const Tensors& ts) {
  std::vector<View> views;
  views.reserve(ts.size());
  for (const Tensor& t : ts) views.push_back(view(t));
  return views;
}

int32_t shim_code(ScalarType type) {
  switch (type) {
    case ScalarType::Half: return aoti_torch_dtype_float16();
    case ScalarType::BFloat16: return aoti_torch_dtype_bfloat16();
    case ScalarType::Double: return aoti_torch_dtype_float64();
    default: return aoti_torch_dtype_float32();
  }
}

// Allocates past the dispatcher, which takes as long as the rest of a small call.
Tensor empty_strided(const Tensor& on, int32_t ndim, const int64_t* sizes, const int64_t* strides, ScalarType dtype) {
  int32_t device_type = 0;
  AtenTensorHandle found = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(on.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(ndim, sizes, strides, shim_code(dtype), device_type, on.get_device_index(), &found));
  return Tensor(found);
}

// Allocates like t, in another dtype: a dense tensor's strides are kept.
Tensor empty_like(const Tensor& t, ScalarType dtype) {
  const View like = view(t);
  if (like.contiguous()) return empty_strided(t, like.ndim, like.sizes, like.strides, dtype);
  using torch::stable::detail::from;
  std::array<StableIValue, 6> stack{from(t),
                                    from(std::optional<ScalarType>(dtype)),
                                    from(std::nullopt),
                                    from(std::nullopt),
                                    from(std::nullopt),
                                    from(std::nullopt)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::empty_like", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace
