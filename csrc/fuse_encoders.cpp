// fuse_encoders on the CPU.
#include "merv_fast/fuse.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "dtypes.h"

namespace merv_fast {
namespace {

using torch::stable::Tensor;

template <class Element>
void fuse(const std::vector<Tensor>& values, const Tensor& query, const Tensor& bias, int64_t S, Tensor& tokens,
          Tensor& encoder_weights) {
  const int64_t B = tokens.size(0), D = tokens.size(2), E = static_cast<int64_t>(values.size());
  std::vector<Tokens<Element>> encoders(B * E);
  for (int64_t b = 0; b < B; ++b)
    for (int64_t e = 0; e < E; ++e)
      encoders[b * E + e] = {static_cast<const Element*>(values[e].const_data_ptr()) + b * values[e].stride(0),
                             values[e].size(1), values[e].stride(1)};

  const int64_t pieces = (D + kMeanChannels - 1) / kMeanChannels;
  std::vector<Sum<Element>> means(B * E * D);
  torch::stable::parallel_for(0, B * E * pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t first = piece % pieces * kMeanChannels;
      Tokens<Element> part = encoders[piece / pieces];
      part.data += first;
      mean(part, std::min(kMeanChannels, D - first), &means[piece / pieces * D + first]);
    }
  });

  const auto* q = static_cast<const Element*>(query.const_data_ptr());
  const auto* added = static_cast<const Element*>(bias.const_data_ptr());
  auto* weights = static_cast<Sum<Element>*>(encoder_weights.mutable_data_ptr());
  for (int64_t b = 0; b < B; ++b) {
    double scores[kMostEncoders];
    for (int64_t e = 0; e < E; ++e) {
      scores[e] = to_sum(added[e]);
      const auto* row = &means[(b * E + e) * D];
      for (int64_t d = 0; d < D; ++d) scores[e] += static_cast<double>(row[d]) * to_sum(q[d]);
    }
    softmax(scores, E);
    for (int64_t e = 0; e < E; ++e) weights[b * E + e] = static_cast<Sum<Element>>(scores[e]);
  }

  auto* out = static_cast<Element*>(tokens.mutable_data_ptr());
  torch::stable::parallel_for(0, B * S, 64, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin / S; b * S < end; ++b)
      weigh(&encoders[b * E], weights + b * E, E, D, std::max<int64_t>(begin - b * S, 0), std::min(end - b * S, S),
            out + b * S * D);
  });
}

std::tuple<Tensor, Tensor> fuse_encoders(std::vector<Tensor> values, Tensor query, Tensor bias) {
  STD_TORCH_CHECK(!values.empty() && values.size() <= kMostEncoders, "fuse_encoders: values must be 1 to ",
                  kMostEncoders, " tensors, got ", values.size());
  int64_t S = 1;
  for (const Tensor& value : values) {
    STD_TORCH_CHECK(value.dim() == 3 && value.size(0) == values[0].size(0) && value.size(2) == values[0].size(2) &&
                        value.scalar_type() == query.scalar_type(),
                    "fuse_encoders: values must be [B, S, D] of the dtype of query");
    S = std::max(S, value.size(1));
  }
  STD_TORCH_CHECK(query.dim() == 1 && query.size(0) == values[0].size(2) && bias.dim() == 1 &&
                      bias.size(0) == static_cast<int64_t>(values.size()) &&
                      bias.scalar_type() == query.scalar_type(),
                  "fuse_encoders: query must be [D] and bias [E], of one dtype");
  for (Tensor& value : values) {
    STD_TORCH_CHECK(value.size(1) == 1 || value.size(1) == S, "fuse_encoders: values must have S tokens, or one");
    if (value.stride(2) != 1) value = torch::stable::contiguous(value);
  }
  const int64_t B = values[0].size(0), D = values[0].size(2), E = static_cast<int64_t>(values.size());
  query = torch::stable::contiguous(query);
  bias = torch::stable::contiguous(bias);
  Tensor tokens = torch::stable::new_empty(values[0], {B, S, D});
  const auto sums = query.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor encoder_weights = torch::stable::new_empty(values[0], {B, E}, sums);
  with_element(query.scalar_type(),
               [&](auto zero) { fuse<decltype(zero)>(values, query, bias, S, tokens, encoder_weights); });
  return {tokens, encoder_weights};
}

}  // namespace
}  // namespace merv_fast

STABLE_TORCH_LIBRARY_IMPL(merv_fast, CPU, m) { m.impl("fuse_encoders", TORCH_BOX(&merv_fast::fuse_encoders)); }
