// Short vectors that GCC and Clang lower to whatever the target has, and clones of a function for wider registers.
#pragma once

#include <cstdint>
#include <cstring>

// A clone is chosen when the library is loaded, by what the processor has. It needs glibc's indirect functions.
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__AVX2__)
#define MERV_FAST_CLONES __attribute__((target_clones("avx2", "default")))
#else
#define MERV_FAST_CLONES
#endif

// Inlined, or it would not be compiled for the target of the clone that calls it.
#define MERV_FAST_INLINE inline __attribute__((always_inline))

namespace merv_fast {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the shuffles below are for little-endian processors");

typedef uint8_t u8x16 __attribute__((vector_size(16)));
typedef int32_t i32x4 __attribute__((vector_size(16)));
typedef int32_t i32x8 __attribute__((vector_size(32)));

// Through references: vectors passed by value would change the ABI with the target.
template <class Vector>
MERV_FAST_INLINE void load(Vector& to, const void* from) {
  std::memcpy(&to, from, sizeof(Vector));
}

template <class Vector>
MERV_FAST_INLINE void store(void* to, const Vector& from) {
  std::memcpy(to, &from, sizeof(Vector));
}

// Bytes first .. first + 3 as int32. Shuffles, as compilers convert vectors of so few bytes one by one.
template <int first>
MERV_FAST_INLINE void widen(i32x4& to, const u8x16& from) {
  constexpr int a = first, b = first + 1, c = first + 2, d = first + 3;
  to = reinterpret_cast<i32x4>(
      __builtin_shufflevector(from, u8x16{}, a, 16, 16, 16, b, 16, 16, 16, c, 16, 16, 16, d, 16, 16, 16));
}

// The low byte of each of four int32.
MERV_FAST_INLINE uint32_t narrow(const i32x4& from) {
  const u8x16 wide = reinterpret_cast<u8x16>(from);
  const u8x16 bytes = __builtin_shufflevector(wide, wide, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12);
  uint32_t out;
  std::memcpy(&out, &bytes, 4);
  return out;
}

}  // namespace merv_fast
