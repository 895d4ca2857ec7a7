// Which samples an output of a resampling pass reads, and Pillow's integer coefficients for them.
//
// The definition stands in merv_fast/ops/resample_frames.py. The last bit of a coefficient depends on the order of
// the double operations below: compile with -ffp-contract=off, so that none of them is fused.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace merv_fast {

enum class Filter { bilinear, bicubic };

constexpr int kPrecision = 22;  // a coefficient of 2^22 stands for 1

// Output j is the sum over k < width of coefficients[j * width + k] * in[start[j] + k]; unused ones are zero.
struct Taps {
  int64_t width = 0;
  std::vector<int64_t> start;
  std::vector<int64_t> count;
  std::vector<int32_t> coefficients;
};

inline double filter_value(Filter filter, double x) {
  x = std::fabs(x);
  if (filter == Filter::bilinear) return x < 1.0 ? 1.0 - x : 0.0;
  if (x < 1.0) return (1.5 * x - 2.5) * x * x + 1.0;
  if (x < 2.0) return (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5;
  return 0.0;
}

// The pass from n to m samples, of which only the outputs first .. first + outputs - 1 are wanted.
inline Taps make_taps(int64_t n, int64_t m, Filter filter, int64_t first, int64_t outputs) {
  const double support = filter == Filter::bilinear ? 1.0 : 2.0;
  const double scale = static_cast<double>(n) / static_cast<double>(m);
  const double stretch = std::max(scale, 1.0);
  const double reach = support * stretch, shrink = 1.0 / stretch;
  Taps taps;
  taps.start.resize(outputs);
  taps.count.resize(outputs);
  for (int64_t j = 0; j < outputs; ++j) {
    const double centre = (static_cast<double>(first + j) + 0.5) * scale;
    taps.start[j] = std::max<int64_t>(static_cast<int64_t>(centre - reach + 0.5), 0);
    taps.count[j] = std::min<int64_t>(static_cast<int64_t>(centre + reach + 0.5), n) - taps.start[j];
    taps.width = std::max(taps.width, taps.count[j]);
  }
  taps.coefficients.assign(outputs * taps.width, 0);
  std::vector<double> weights(taps.width);
  for (int64_t j = 0; j < outputs; ++j) {
    const double centre = (static_cast<double>(first + j) + 0.5) * scale;
    double total = 0.0;
    for (int64_t k = 0; k < taps.count[j]; ++k) {
      weights[k] = filter_value(filter, (static_cast<double>(taps.start[j] + k) - centre + 0.5) * shrink);
      total += weights[k];
    }
    for (int64_t k = 0; k < taps.count[j]; ++k) {
      const double share = weights[k] / total;
      const double half = share >= 0 ? 0.5 : -0.5;
      taps.coefficients[j * taps.width + k] = static_cast<int32_t>(share * (1 << kPrecision) + half);
    }
  }
  return taps;
}

// Of pictures of rows x columns samples, resized to height x width, the part that is wanted.
struct Crop {
  int64_t top, left, rows, columns;
};

// A resize cut down to what the crop needs: a window of the source, and passes that read the window.
struct Passes {
  int64_t top, left, rows, columns;  // the window
  Crop crop;
  bool horizontal, vertical, vertical_first;
  Taps across, down;  // empty where there is no such pass
};

// Make the samples that `taps` read start at 0; returns the first of them and leaves in `length` how many there are.
inline int64_t shift_to_zero(Taps& taps, int64_t& length) {
  int64_t first = taps.start[0], last = 0;
  for (size_t j = 0; j < taps.start.size(); ++j) {
    first = std::min(first, taps.start[j]);
    last = std::max(last, taps.start[j] + taps.count[j]);
  }
  for (int64_t& start : taps.start) start -= first;
  length = last - first;
  return first;
}

inline Passes plan_passes(int64_t H, int64_t W, int64_t h, int64_t w, Filter filter, const Crop& crop) {
  Passes passes{crop.top, crop.left, crop.rows, crop.columns, crop, w != W, h != H, false, {}, {}};
  passes.vertical_first = H - h > std::max<int64_t>(0, 2 * (W - w));
  if (passes.vertical) {
    passes.down = make_taps(H, h, filter, crop.top, crop.rows);
    passes.top = shift_to_zero(passes.down, passes.rows);
  }
  if (passes.horizontal) {
    passes.across = make_taps(W, w, filter, crop.left, crop.columns);
    passes.left = shift_to_zero(passes.across, passes.columns);
  }
  return passes;
}

}  // namespace merv_fast
