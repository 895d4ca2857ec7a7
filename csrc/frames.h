// What the bindings of the resampling ops share: the tensor of frames and its arguments, taken apart.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <string>
#include <vector>

#include "merv_fast/resample_taps.h"

namespace merv_fast {

using torch::stable::Tensor;

inline Filter filter_of(const std::string& method) {
  return method == "bicubic" ? Filter::bicubic : Filter::bilinear;
}

// [..., H, W, C] uint8 of any strides.
struct Frames {
  const uint8_t* data;
  std::vector<int64_t> lead, lead_strides;
  int64_t count = 1;  // frames: the product of the leading dimensions
  int64_t H, W, C, row_stride, column_stride, channel_stride;

  explicit Frames(const Tensor& frames) : data(static_cast<const uint8_t*>(frames.const_data_ptr())) {
    const int64_t dims = frames.dim() - 3;
    for (int64_t d = 0; d < dims; ++d) {
      lead.push_back(frames.size(d));
      lead_strides.push_back(frames.stride(d));
      count *= lead.back();
    }
    H = frames.size(dims), W = frames.size(dims + 1), C = frames.size(dims + 2);
    row_stride = frames.stride(dims), column_stride = frames.stride(dims + 1), channel_stride = frames.stride(dims + 2);
  }

  const uint8_t* frame(int64_t index) const {
    int64_t offset = 0;
    for (int64_t d = static_cast<int64_t>(lead.size()) - 1; d >= 0; --d) {
      offset += index % lead[d] * lead_strides[d];
      index /= lead[d];
    }
    return data + offset;
  }

  std::vector<int64_t> with_shape(int64_t a, int64_t b, int64_t c) const {
    std::vector<int64_t> shape = lead;
    shape.insert(shape.end(), {a, b, c});
    return shape;
  }
};

}  // namespace merv_fast
