// bfloat16 and float16 as bits, with the conversions to and from the type that sums are made in.
#pragma once

#include <cstdint>
#include <cstring>

#include "merv_fast/vectors.h"

namespace merv_fast {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class Element>
struct SumOf {
  using type = float;
};
template <>
struct SumOf<double> {
  using type = double;
};
template <class Element>
using Sum = typename SumOf<Element>::type;

MERV_FAST_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

MERV_FAST_INLINE float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

MERV_FAST_INLINE double to_sum(double x) { return x; }
MERV_FAST_INLINE float to_sum(float x) { return x; }
MERV_FAST_INLINE float to_sum(BFloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
MERV_FAST_INLINE float to_sum(Float16 x) {
  // The multiplication moves the exponent's bias, which also makes subnormals right; infinity and NaN are set.
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  const uint32_t special = magnitude >= 0x7c00u << 13 ? 0x7f800000 : 0;
  return float_of(bits_of(float_of(magnitude) * 0x1p112f) | special | static_cast<uint32_t>(x.bits & 0x8000) << 16);
}

// Rounded to the nearest, ties to even.
MERV_FAST_INLINE void from_sum(double x, double& to) { to = x; }
MERV_FAST_INLINE void from_sum(float x, float& to) { to = x; }
MERV_FAST_INLINE void from_sum(float x, BFloat16& to) {
  const uint32_t bits = bits_of(x), rounded = bits + 0x7fff + (bits >> 16 & 1);
  to.bits = static_cast<uint16_t>(x == x ? rounded >> 16 : 0x7fc0);
}
MERV_FAST_INLINE void from_sum(float x, Float16& to) {
  const uint32_t sign = bits_of(x) >> 16 & 0x8000, u = bits_of(x) & 0x7fffffff;
  uint32_t out;
  if (u >= 0x47800000)
    out = u > 0x7f800000 ? 0x7e00 : 0x7c00;
  else if (u < 0x38800000)  // subnormal: adding a half aligns the bits that stay
    out = bits_of(float_of(u) + 0.5f) - 0x3f000000;
  else
    out = (u - 0x38000000 + 0xfff + (u >> 13 & 1)) >> 13;
  to.bits = static_cast<uint16_t>(out | sign);
}

}  // namespace merv_fast
