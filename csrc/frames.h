// What the bindings of the resampling ops share: the tensor of frames and its arguments, taken apart.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <string>
#include <vector>

#include "merv_fast/resample_taps.h"
#include "merv_fast/spacing.h"

namespace merv_fast {

using torch::stable::Tensor;

inline void check_frames(const Tensor& frames, const std::vector<int64_t>& size, const std::string& method) {
  STD_TORCH_CHECK(frames.scalar_type() == torch::headeronly::ScalarType::Byte && frames.dim() >= 3,
                  "merv_fast: frames must be uint8 [..., H, W, C]");
  STD_TORCH_CHECK(size.size() == 2 && size[0] >= 1 && size[1] >= 1, "merv_fast: size must be two positive numbers");
  STD_TORCH_CHECK(method == "bicubic" || method == "bilinear", "merv_fast: method must be bicubic or bilinear");
  for (int64_t d = frames.dim() - 3; d < frames.dim(); ++d)
    STD_TORCH_CHECK(frames.size(d) >= 1, "merv_fast: frames must be uint8 [..., H, W, C]");
}

// `check_frames`, a crop inside the resized frames, and tables of 256 levels for each channel.
inline void check_levels(const Tensor& frames, const std::vector<int64_t>& size, const std::string& method,
                         const std::vector<int64_t>& crop, const std::vector<Tensor>& levels) {
  check_frames(frames, size, method);
  STD_TORCH_CHECK(crop.size() == 4 && crop[0] >= 0 && crop[1] >= 0 && crop[2] >= 1 && crop[3] >= 1 &&
                      crop[0] + crop[2] <= size[0] && crop[1] + crop[3] <= size[1],
                  "merv_fast: crop must lie inside size and not be empty");
  for (const Tensor& level : levels) {
    STD_TORCH_CHECK(level.dim() == 2 && level.size(0) == frames.size(frames.dim() - 1) && level.size(1) == 256,
                    "merv_fast: levels must be [C, 256]");
    const size_t bytes = level.element_size();
    STD_TORCH_CHECK(bytes == 2 || bytes == 4 || bytes == 8, "merv_fast: levels must be of 2, 4 or 8 bytes");
  }
}

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

  // Whether frames lie at one distance from each other: `frame_stride`, 0 if there is only one.
  bool evenly_spaced(int64_t& frame_stride) const { return even_spacing(lead, lead_strides, frame_stride); }

  std::vector<int64_t> with_shape(int64_t a, int64_t b, int64_t c) const {
    std::vector<int64_t> shape = lead;
    shape.insert(shape.end(), {a, b, c});
    return shape;
  }
};

}  // namespace merv_fast
