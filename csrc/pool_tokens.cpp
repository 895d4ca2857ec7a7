// pool_tokens on the CPU.
#include "merv_fast/pool.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "dtypes.h"

namespace merv_fast {
namespace {

using torch::stable::Tensor;

Tensor pool_tokens(Tensor input, std::vector<int64_t> grid, std::vector<int64_t> out_grid, int64_t out_slots) {
  const Tensor x = input.stride(3) == 1 ? input : torch::stable::contiguous(input);
  const PoolShape s{x.size(0),   x.size(1),   grid[0],     grid[1],     x.size(3),  out_slots,
                    out_grid[0], out_grid[1], x.stride(0), x.stride(1), x.stride(2)};
  Tensor output = torch::stable::new_empty(x, {s.B, s.t, s.h * s.w, s.C});
  with_element(x.scalar_type(), [&](auto zero) {
    using Element = decltype(zero);
    const auto* from = static_cast<const Element*>(x.const_data_ptr());
    auto* to = static_cast<Element*>(output.mutable_data_ptr());
    torch::stable::parallel_for(0, s.B * s.t * s.h, 1,
                                [&](int64_t begin, int64_t end) { pool(from, s, begin, end, to); });
  });
  return output;
}

}  // namespace
}  // namespace merv_fast

STABLE_TORCH_LIBRARY_IMPL(merv_fast, CPU, m) { m.impl("pool_tokens", TORCH_BOX(&merv_fast::pool_tokens)); }
