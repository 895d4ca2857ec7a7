#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/csrc/stable/ops.h>
using torch::stable::Tensor;
Tensor twice(Tensor x) {
  Tensor out = torch::stable::clone(x);
  float* p = static_cast<float*>(out.data_ptr());
  for (int64_t i = 0; i < out.numel(); ++i) p[i] *= 2;
  return out;
}
STABLE_TORCH_LIBRARY(merv_fast_probe, m) { m.def("twice(Tensor x) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(merv_fast_probe, CPU, m) { m.impl("twice", TORCH_BOX(&twice)); }
