// Averages of bins of tokens on the CPU; the definition is merv_fast/ops/pool_tokens.py.
#pragma once

#include <cstdint>

#include "merv_fast/elements.h"
#include "merv_fast/vectors.h"

namespace merv_fast {

// [B, T, H*W, C] -> [B, t, h*w, C] contiguous; strides in elements, that of channels is 1.
struct PoolShape {
  int64_t B, T, H, W, C, t, h, w;
  int64_t video_stride, slot_stride, token_stride;
};

// Bin `index` of `count` over `size` samples: begin .. end - 1.
struct Bin {
  int64_t begin, end;
  Bin(int64_t index, int64_t size, int64_t count)
      : begin(index * size / count), end(((index + 1) * size + count - 1) / count) {}
};

// Sums of a block of channels stay in registers while the tokens of a bin pass. What comes kAhead blocks later, in these
// tokens or in those of the next cell, is fetched meanwhile: hardware does not foresee blocks that jump between tokens.
template <class Element>
MERV_FAST_INLINE void pool_cell(const Element* video, const PoolShape& s, const Bin& slots, const Bin& rows,
                                const Bin& columns, Element* out) {
  constexpr int64_t kBlock = 512 / sizeof(Sum<Element>), kAhead = 4 * kBlock, kLine = 64 / sizeof(Element);
  const int64_t width = columns.end - columns.begin;
  const auto count = static_cast<Sum<Element>>((slots.end - slots.begin) * (rows.end - rows.begin) * width);
  const auto block = [&](int64_t first, int64_t channels) __attribute__((always_inline)) {
    const int64_t later = first + kAhead < s.C ? kAhead : kAhead - s.C + width * s.token_stride;
    Sum<Element> sum[kBlock] = {};
    for (int64_t slot = slots.begin; slot < slots.end; ++slot)
      for (int64_t y = rows.begin; y < rows.end; ++y)
        for (int64_t x = columns.begin; x < columns.end; ++x) {
          const Element* token = video + slot * s.slot_stride + (y * s.W + x) * s.token_stride + first;
          for (int64_t c = 0; c < channels; c += kLine) __builtin_prefetch(token + later + c);
          for (int64_t c = 0; c < channels; ++c) sum[c] += to_sum(token[c]);
        }
    for (int64_t c = 0; c < channels; ++c) from_sum(sum[c] / count, out[first + c]);
  };
  int64_t first = 0;
  for (; first + kBlock <= s.C; first += kBlock) block(first, kBlock);
  if (first < s.C) block(first, s.C - first);
}

// Rows begin .. end - 1 of the B * t * h rows of output cells.
template <class Element>
MERV_FAST_INLINE void pool_rows(const Element* x, const PoolShape& s, int64_t begin, int64_t end, Element* out) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t i = row % s.h, k = row / s.h % s.t, b = row / s.h / s.t;
    for (int64_t j = 0; j < s.w; ++j)
      pool_cell(x + b * s.video_stride, s, Bin(k, s.T, s.t), Bin(i, s.H, s.h), Bin(j, s.W, s.w),
                out + (row * s.w + j) * s.C);
  }
}

MERV_FAST_CLONES static void pool(const double* x, const PoolShape& s, int64_t begin, int64_t end, double* out) {
  pool_rows(x, s, begin, end, out);
}
MERV_FAST_CLONES static void pool(const float* x, const PoolShape& s, int64_t begin, int64_t end, float* out) {
  pool_rows(x, s, begin, end, out);
}
MERV_FAST_CLONES static void pool(const BFloat16* x, const PoolShape& s, int64_t begin, int64_t end, BFloat16* out) {
  pool_rows(x, s, begin, end, out);
}
MERV_FAST_CLONES static void pool(const Float16* x, const PoolShape& s, int64_t begin, int64_t end, Float16* out) {
  pool_rows(x, s, begin, end, out);
}

}  // namespace merv_fast
