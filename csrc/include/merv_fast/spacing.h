// Whether what several dimensions count lies at one distance.
#pragma once

#include <cstdint>
#include <vector>

namespace merv_fast {

// Whether one step of `stride` leads from each element of these dimensions, the last counting fastest, to the next;
// dimensions of a single element lead nowhere. Of one element altogether the stride is 0.
inline bool even_spacing(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, int64_t& stride) {
  int64_t count = 1;
  stride = 0;
  for (int64_t d = static_cast<int64_t>(sizes.size()) - 1; d >= 0; --d) {
    if (sizes[d] == 1) continue;
    if (count == 1) stride = strides[d];
    if (strides[d] != count * stride) return false;
    count *= sizes[d];
  }
  return true;
}

}  // namespace merv_fast
