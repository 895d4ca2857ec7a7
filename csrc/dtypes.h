// From torch's dtypes to the element types of the kernels.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "merv_fast/elements.h"

namespace merv_fast {

using torch::headeronly::ScalarType;

// Call run with a value of the element type of `dtype`.
template <class Run>
void with_element(ScalarType dtype, const Run& run) {
  switch (dtype) {
    case ScalarType::Double:
      return run(double{});
    case ScalarType::Float:
      return run(float{});
    case ScalarType::BFloat16:
      return run(BFloat16{});
    case ScalarType::Half:
      return run(Float16{});
    default:
      STD_TORCH_CHECK(false, "merv_fast: dtype must be float64, float32, bfloat16 or float16");
  }
}

}  // namespace merv_fast
