// The two passes of fuse_encoders over the tokens, on the CPU; the definition is merv_fast/ops/fuse_encoders.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "merv_fast/elements.h"
#include "merv_fast/vectors.h"

namespace merv_fast {

constexpr int kMostEncoders = 8;
constexpr int64_t kMeanChannels = 256;  // channels of one piece of work of the first pass

// The tokens of one encoder of one video: [tokens, D], channels next to each other.
template <class Element>
struct Tokens {
  const Element* data;
  int64_t tokens, token_stride;
};

// Means of up to kMeanChannels channels. Sums of 32 tokens are summed: rounding grows with the longer of both.
template <class Element>
MERV_FAST_INLINE void mean_channels(const Tokens<Element>& values, int64_t channels, Sum<Element>* mean) {
  Sum<Element> total[kMeanChannels] = {};
  for (int64_t first = 0; first < values.tokens; first += 32) {
    Sum<Element> sum[kMeanChannels] = {};
    for (int64_t s = first; s < std::min(first + 32, values.tokens); ++s) {
      const Element* token = values.data + s * values.token_stride;
      for (int64_t c = 0; c < channels; ++c) sum[c] += to_sum(token[c]);
    }
    for (int64_t c = 0; c < channels; ++c) total[c] += sum[c];
  }
  for (int64_t c = 0; c < channels; ++c) mean[c] = total[c] / static_cast<Sum<Element>>(values.tokens);
}

// out[c] = sum_e weights[e] * values[e][c], encoder after encoder, every product rounded.
template <class Element>
MERV_FAST_INLINE void weigh_token(const Element* const* values, const Sum<Element>* weights, int64_t E, int64_t D,
                                  Element* out) {
  constexpr int64_t kBlock = 128 / sizeof(Sum<Element>);
  const auto block = [&](int64_t first, int64_t channels) __attribute__((always_inline)) {
    Sum<Element> sum[kBlock] = {};
    for (int64_t e = 0; e < E; ++e)
      for (int64_t c = 0; c < channels; ++c) sum[c] += weights[e] * to_sum(values[e][first + c]);
    for (int64_t c = 0; c < channels; ++c) from_sum(sum[c], out[first + c]);
  };
  int64_t first = 0;
  for (; first + kBlock <= D; first += kBlock) block(first, kBlock);
  if (first < D) block(first, D - first);
}

// Tokens begin .. end - 1 of one video, of which encoders with a single token repeat it.
template <class Element>
MERV_FAST_INLINE void weigh_tokens(const Tokens<Element>* values, const Sum<Element>* weights, int64_t E, int64_t D,
                                   int64_t begin, int64_t end, Element* out) {
  for (int64_t s = begin; s < end; ++s) {
    const Element* rows[kMostEncoders];
    for (int64_t e = 0; e < E; ++e) rows[e] = values[e].data + (values[e].tokens == 1 ? 0 : s * values[e].token_stride);
    weigh_token(rows, weights, E, D, out + s * D);
  }
}

#define MERV_FAST_FUSE(Element)                                                                                \
  MERV_FAST_CLONES static void mean(const Tokens<Element>& values, int64_t channels, Sum<Element>* out) {      \
    mean_channels(values, channels, out);                                                                      \
  }                                                                                                            \
  MERV_FAST_CLONES static void weigh(const Tokens<Element>* values, const Sum<Element>* weights, int64_t E,    \
                                     int64_t D, int64_t begin, int64_t end, Element* out) {                    \
    weigh_tokens(values, weights, E, D, begin, end, out);                                                      \
  }
MERV_FAST_FUSE(double)
MERV_FAST_FUSE(float)
MERV_FAST_FUSE(BFloat16)
MERV_FAST_FUSE(Float16)
#undef MERV_FAST_FUSE

// weights = softmax(scores), in place; in double, whatever the weights are kept in.
inline void softmax(double* scores, int64_t E) {
  double most = scores[0], total = 0;
  for (int64_t e = 1; e < E; ++e) most = std::max(most, scores[e]);
  for (int64_t e = 0; e < E; ++e) total += scores[e] = std::exp(scores[e] - most);
  for (int64_t e = 0; e < E; ++e) scores[e] /= total;
}

}  // namespace merv_fast
