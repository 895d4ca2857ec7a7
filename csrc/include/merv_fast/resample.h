// Resampling of 8-bit frames on the CPU, bit-identical to Pillow; the definition is merv_fast/ops/resample_frames.py.
//
// The horizontal pass widens a few rows to int32 pixels of four lanes, so that two pixels fill a vector whatever the
// number of channels; the vertical pass runs along the bytes of a row. Both keep Pillow's int32 arithmetic.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "merv_fast/resample_taps.h"
#include "merv_fast/vectors.h"

namespace merv_fast {

constexpr int kRowsAtOnce = 4;  // rows that share one load of the coefficients
constexpr int32_t kHalf = 1 << (kPrecision - 1);

// What one thread needs beside its frame; kept from frame to frame.
struct ResampleScratch {
  std::vector<uint8_t> packed, between, row;
  std::vector<int32_t> wide;
};

// The coefficients of the horizontal pass, each repeated for four lanes, in pairs of pixels.
struct LaneTaps {
  int64_t pairs = 0;
  std::vector<int32_t> coefficients;  // [outputs, pairs, 8]

  explicit LaneTaps(const Taps& taps) : pairs((taps.width + 1) / 2) {
    coefficients.assign(taps.start.size() * pairs * 8, 0);
    for (size_t j = 0; j < taps.start.size(); ++j)
      for (int64_t k = 0; k < taps.width; ++k)
        std::fill_n(&coefficients[(j * pairs * 2 + k) * 4], 4, taps.coefficients[j * taps.width + k]);
  }
};

// Four channels of each of n pixels, C bytes apart, as int32. With fewer than four left, lanes hold the next pixel's.
MERV_FAST_CLONES static void widen_pixels(const uint8_t* in, int64_t n, int64_t C, int64_t lanes, int32_t* out) {
  int64_t x = 0;
  if (C == 3)
    for (; x + 6 <= n; x += 4) {
      u8x16 bytes;
      load(bytes, in + 3 * x);
      i32x4 pixels[4];
      widen<0>(pixels[0], bytes);
      widen<3>(pixels[1], bytes);
      widen<6>(pixels[2], bytes);
      widen<9>(pixels[3], bytes);
      for (int i = 0; i < 4; ++i) store(out + 4 * (x + i), pixels[i]);
    }
  // Nothing may be read past the row.
  for (; x < n; ++x)
    for (int64_t c = 0; c < 4; ++c) out[4 * x + c] = c < lanes ? in[x * C + c] : 0;
}

template <int R>
MERV_FAST_INLINE void resample_wide_rows(const int32_t* wide, int64_t wide_stride, const Taps& taps,
                                         const LaneTaps& lanes, int64_t C, uint8_t* out, int64_t out_stride) {
  const int64_t outputs = static_cast<int64_t>(taps.start.size());
  const int32_t* coefficients = lanes.coefficients.data();
  for (int64_t j = 0; j < outputs; ++j) {
    i32x8 sum[R];
    for (int r = 0; r < R; ++r) sum[r] = i32x8{kHalf, kHalf, kHalf, kHalf, 0, 0, 0, 0};
    const int32_t* pixels = wide + 4 * taps.start[j];
    for (int64_t p = 0; p < lanes.pairs; ++p, coefficients += 8, pixels += 8) {
      i32x8 c, pair;
      load(c, coefficients);
      for (int r = 0; r < R; ++r) {
        load(pair, pixels + r * wide_stride);
        sum[r] += pair * c;
      }
    }
    for (int r = 0; r < R; ++r) {
      i32x4 low, high;
      load(low, &sum[r]);
      load(high, reinterpret_cast<const int32_t*>(&sum[r]) + 4);
      i32x4 value = (low + high) >> kPrecision;
      value = value < 0 ? i32x4{} : value;
      value = value > 255 ? i32x4{} + 255 : value;
      store(out + r * out_stride + j * C, narrow(value));
    }
  }
}

// Up to kRowsAtOnce rows; writes up to three bytes past each row of `out`.
MERV_FAST_CLONES static void resample_wide(const int32_t* wide, int64_t wide_stride, int64_t rows, const Taps& taps,
                                           const LaneTaps& lanes, int64_t C, uint8_t* out, int64_t out_stride) {
  if (rows == kRowsAtOnce) return resample_wide_rows<kRowsAtOnce>(wide, wide_stride, taps, lanes, C, out, out_stride);
  for (int64_t r = 0; r < rows; ++r)
    resample_wide_rows<1>(wide + r * wide_stride, wide_stride, taps, lanes, C, out + r * out_stride, out_stride);
}

// The vertical pass to one row of `bytes` samples from `count` rows.
MERV_FAST_CLONES static void resample_column_row(const uint8_t* in, int64_t in_stride, const int32_t* coefficients,
                                                 int64_t count, int64_t bytes, uint8_t* out) {
  constexpr int64_t kBlock = 1024;  // its sums stay in the first-level cache
  int32_t sum[kBlock];
  for (int64_t x = 0; x < bytes; x += kBlock) {
    const int64_t block = std::min(kBlock, bytes - x);
    std::fill_n(sum, block, kHalf);
    for (int64_t k = 0; k < count; ++k) {
      const int32_t coefficient = coefficients[k];
      const uint8_t* row = in + k * in_stride + x;
      for (int64_t i = 0; i < block; ++i) sum[i] += coefficient * row[i];
    }
    for (int64_t i = 0; i < block; ++i) out[x + i] = static_cast<uint8_t>(std::clamp(sum[i] >> kPrecision, 0, 255));
  }
}

// All that does not depend on the frame: made once, then read by every thread.
class FrameResampler {
 public:
  FrameResampler(int64_t H, int64_t W, int64_t C, int64_t h, int64_t w, Filter filter, const Crop& crop)
      : C_(C), passes_(plan_passes(H, W, h, w, filter, crop)), lanes_(passes_.across) {}

  // One frame [H, W, C] of any strides (in bytes) to `out`, [crop.rows, crop.columns, C] contiguous.
  void operator()(const uint8_t* frame, int64_t row_stride, int64_t column_stride, int64_t channel_stride,
                  uint8_t* out, ResampleScratch& scratch) const {
    const Passes& p = passes_;
    const uint8_t* in = frame + p.top * row_stride + p.left * column_stride;
    if (channel_stride != 1 || column_stride != C_) {
      in = pack(in, row_stride, column_stride, channel_stride, scratch);
      row_stride = p.columns * C_;
    }
    const int64_t out_stride = p.crop.columns * C_;
    if (p.horizontal && p.vertical) {
      if (p.vertical_first) {
        scratch.between.resize(p.crop.rows * p.columns * C_);
        columns_pass(in, row_stride, p.columns * C_, scratch.between.data());
        rows_pass(scratch.between.data(), p.columns * C_, p.crop.rows, out, scratch);
      } else {
        scratch.between.resize(p.rows * out_stride);
        rows_pass(in, row_stride, p.rows, scratch.between.data(), scratch);
        columns_pass(scratch.between.data(), out_stride, out_stride, out);
      }
    } else if (p.horizontal) {
      rows_pass(in, row_stride, p.rows, out, scratch);
    } else if (p.vertical) {
      columns_pass(in, row_stride, out_stride, out);
    } else {
      for (int64_t y = 0; y < p.rows; ++y) std::memcpy(out + y * out_stride, in + y * row_stride, out_stride);
    }
  }

 private:
  const uint8_t* pack(const uint8_t* in, int64_t row_stride, int64_t column_stride, int64_t channel_stride,
                      ResampleScratch& scratch) const {
    scratch.packed.resize(passes_.rows * passes_.columns * C_);
    uint8_t* to = scratch.packed.data();
    for (int64_t y = 0; y < passes_.rows; ++y)
      for (int64_t x = 0; x < passes_.columns; ++x)
        for (int64_t c = 0; c < C_; ++c) *to++ = in[y * row_stride + x * column_stride + c * channel_stride];
    return scratch.packed.data();
  }

  void rows_pass(const uint8_t* in, int64_t in_stride, int64_t rows, uint8_t* out, ResampleScratch& scratch) const {
    const int64_t out_stride = passes_.crop.columns * C_, slack = 3;
    // Pixels past the row stay zero: the last outputs' unused coefficients meet them.
    const int64_t wide_stride = 4 * (passes_.columns + 2 * lanes_.pairs);
    scratch.wide.assign(kRowsAtOnce * wide_stride, 0);
    scratch.row.resize(kRowsAtOnce * (out_stride + slack));
    for (int64_t y = 0; y < rows; y += kRowsAtOnce) {
      const int64_t some = std::min<int64_t>(kRowsAtOnce, rows - y);
      // From the last four channels down, as a group writes four bytes even where fewer are its own.
      for (int64_t c = (C_ - 1) / 4 * 4; c >= 0; c -= 4) {
        for (int64_t r = 0; r < some; ++r)
          widen_pixels(in + (y + r) * in_stride + c, passes_.columns, C_, std::min<int64_t>(4, C_ - c),
                       scratch.wide.data() + r * wide_stride);
        resample_wide(scratch.wide.data(), wide_stride, some, passes_.across, lanes_, C_, scratch.row.data() + c,
                      out_stride + slack);
      }
      for (int64_t r = 0; r < some; ++r)
        std::memcpy(out + (y + r) * out_stride, scratch.row.data() + r * (out_stride + slack), out_stride);
    }
  }

  void columns_pass(const uint8_t* in, int64_t in_stride, int64_t bytes, uint8_t* out) const {
    const Taps& taps = passes_.down;
    for (int64_t i = 0; i < passes_.crop.rows; ++i)
      resample_column_row(in + taps.start[i] * in_stride, in_stride, &taps.coefficients[i * taps.width],
                          taps.count[i], bytes, out + i * bytes);
  }

  int64_t C_;
  Passes passes_;
  LaneTaps lanes_;
};

// planes[c, pixel] = levels[c, bytes[pixel, c]]: from [pixels, C] bytes to C planes of whatever a level is.
template <class Level>
void look_up_levels(const uint8_t* bytes, int64_t pixels, int64_t C, const Level* levels, Level* planes) {
  for (int64_t c = 0; c < C; ++c)
    for (int64_t i = 0; i < pixels; ++i) planes[c * pixels + i] = levels[c * 256 + bytes[i * C + c]];
}

}  // namespace merv_fast
