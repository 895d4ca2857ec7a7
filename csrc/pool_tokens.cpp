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
  STD_TORCH_CHECK(input.dim() == 4 && grid.size() == 2 && out_grid.size() == 2,
                  "pool_tokens: x must be [B, T, N, C], grid and out_grid two numbers");
  STD_TORCH_CHECK(grid[0] >= 1 && grid[1] >= 1 && grid[0] * grid[1] == input.size(2),
                  "pool_tokens: grid must multiply to N");
  STD_TORCH_CHECK(out_grid[0] >= 1 && out_grid[1] >= 1 && out_slots >= 1,
                  "pool_tokens: out_grid and out_slots must be positive");
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
