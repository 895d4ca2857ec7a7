// resample_frames and resample_normalise on the CPU.
#include "merv_fast/resample.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "frames.h"

namespace merv_fast {
namespace {

Tensor resample_frames(Tensor input, std::vector<int64_t> size, std::string method) {
  check_frames(input, size, method);
  const Frames frames(input);
  const int64_t h = size[0], w = size[1];
  Tensor output = torch::stable::new_empty(input, frames.with_shape(h, w, frames.C));
  uint8_t* out = static_cast<uint8_t*>(output.mutable_data_ptr());
  const FrameResampler resample(frames.H, frames.W, frames.C, h, w, filter_of(method), {0, 0, h, w});
  torch::stable::parallel_for(0, frames.count, 1, [&](int64_t begin, int64_t end) {
    ResampleScratch scratch;
    for (int64_t f = begin; f < end; ++f)
      resample(frames.frame(f), frames.row_stride, frames.column_stride, frames.channel_stride,
               out + f * h * w * frames.C, scratch);
  });
  return output;
}

struct Plane {
  const void* levels;
  void* out;
  size_t element_size;
};

void look_up(const Plane& plane, int64_t frame, const uint8_t* bytes, int64_t pixels, int64_t C) {
  const auto run = [&](auto zero) {
    using Level = decltype(zero);  // only moved, so that its size is all that matters
    look_up_levels(bytes, pixels, C, static_cast<const Level*>(plane.levels),
                   static_cast<Level*>(plane.out) + frame * pixels * C);
  };
  if (plane.element_size == 2) return run(uint16_t{});
  if (plane.element_size == 4) return run(uint32_t{});
  return run(uint64_t{});
}

std::vector<Tensor> resample_normalise(Tensor input, std::vector<int64_t> size, std::string method,
                                       std::vector<int64_t> crop, std::vector<Tensor> levels) {
  check_levels(input, size, method, crop, levels);
  const Frames frames(input);
  const Crop part{crop[0], crop[1], crop[2], crop[3]};
  const int64_t pixels = part.rows * part.columns, C = frames.C;
  std::vector<Tensor> tables, outputs;
  std::vector<Plane> planes;
  for (const Tensor& level : levels) {
    tables.push_back(torch::stable::contiguous(level));
    outputs.push_back(torch::stable::new_empty(level, frames.with_shape(C, part.rows, part.columns)));
    planes.push_back({tables.back().const_data_ptr(), outputs.back().mutable_data_ptr(), level.element_size()});
  }
  const FrameResampler resample(frames.H, frames.W, C, size[0], size[1], filter_of(method), part);
  torch::stable::parallel_for(0, frames.count, 1, [&](int64_t begin, int64_t end) {
    ResampleScratch scratch;
    std::vector<uint8_t> bytes(pixels * C);
    for (int64_t f = begin; f < end; ++f) {
      resample(frames.frame(f), frames.row_stride, frames.column_stride, frames.channel_stride, bytes.data(),
               scratch);
      for (const Plane& plane : planes) look_up(plane, f, bytes.data(), pixels, C);
    }
  });
  return outputs;
}

}  // namespace
}  // namespace merv_fast

STABLE_TORCH_LIBRARY_IMPL(merv_fast, CPU, m) {
  m.impl("resample_frames", TORCH_BOX(&merv_fast::resample_frames));
  m.impl("resample_normalise", TORCH_BOX(&merv_fast::resample_normalise));
}
