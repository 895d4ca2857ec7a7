"""The changes that `mutate` makes, each one line that the tests must notice."""

from tests.mutate import Mutation

__all__ = ["MUTATIONS"]


def of(file: str, tests: str, *changes: tuple[str, str]) -> list[Mutation]:
    return [Mutation(f"merv_fast/{file}", f"kernels/{tests}", old, new) for old, new in changes]


POOL_TOKENS = of(
    "kernels/pool_tokens.py",
    "test_pool_tokens.py",
    ("return i * size // count", "return (i * size + count - 1) // count"),
    ("return ((i + 1) * size + count - 1) // count", "return (i + 1) * size // count"),
    ("first_programs[e]) // chunks).to(tl.int64)", "first_programs[e]) // chunks)"),
    ("k.to(tl.int64) * strides_xt[e]", "k * strides_xn[e]"),
    ("(row * W + column)", "(row * H + column)"),
    ("(first + u) // BIN_W % BIN_H", "(first + u) // BIN_H % BIN_H"),
    ("size = bin_size(k, out_t, T)", "size = bin_size(k, T, out_t)"),
    ("(end_column - first_column)", "BIN_W"),
    ("b * stride_ob + s", "b * stride_os + s"),
    ("in_s, in_c = s < S, c < channels[e]", "in_s, in_c = s < S, c < widths[e]"),
    ("(b * E + e) * CHUNKS + chunk", "b * E * CHUNKS + chunk"),
    ("s // (out_h * out_w), s // out_w % out_h, s % out_w", "s // (out_h * out_w), s // out_h % out_h, s % out_w"),
    ("range(0, steps[e], UNROLL)", "range(0, 4, UNROLL)"),
    ("first_programs = (0, *(B * sum(chunks[: e + 1])", "first_programs = (0, *(sum(chunks[: e + 1])"),
)

GEMM = of(
    "kernels/_gemm.py",
    "test_gemm.py",
    ("row = b * S + m_tile * BLOCK_M", "row = m_tile * BLOCK_M"),
    ("height = min(rows - first, GROUP)", "height = GROUP"),
    ("n_tile = tile % (GROUP * n_tiles) // height", "n_tile = tile % n_tiles"),
    ("tl.where(in_s, s, 0))[:, None]", "tl.where(in_s, s - m_tile * BLOCK_M, 0))[:, None]"),
    ("tl.where(in_n, n, 0).to(tl.int64)[:, None]", "tl.where(in_n, n, 0)[:, None]"),
    ("if (m_tile == 0) & (n_tile == 0):", "if (m_tile == 0) & (n_tile == 1):"),
    ("accumulator *= unit / next_unit", "accumulator *= next_unit / unit"),
    ("tl.where(weight < LEAST_WEIGHT, LEAST_WEIGHT, weight)", "weight"),
    ("        accumulator *= unit\n", "        accumulator *= 1.0\n"),
    ("in_k = start + k < Ks[e]", "in_k = start + k < Ks[0]"),
    ("bias += one * pick(w, e, E_POWER) if WEIGHED else one", "bias += one"),
    ('infinite & (tl.abs(accumulator) == float("inf"))', 'infinite & (tl.abs(accumulator) == float("nan"))'),
    ('tl.where((scores == float("-inf")) & (e_index < E)', "tl.where((w == 0.0) & (e_index < E)"),
    ('tl.where((scores == float("-inf")) & (e_index < E)', 'tl.where(scores == float("-inf")'),
    ("0.7071067811865476", "0.7978845608028654"),
    ("(b.to(tl.int64) * S + s)[:, None] * N", "s[:, None] * N"),
    ("tl.where(inside, result.to(tl.float32) * a[None, :], 0.0)", "result.to(tl.float32) * a[None, :]"),
    ("b * stride_sb + m_tile * n_tiles + n_tile", "b * stride_sb + m_tile + n_tile"),
    ("        (S,) * E,\n", "        (B * S,) * E,\n"),
    ("pad(x, (0, -K % ALIGNMENT))", "pad(x, (0, -K % ALIGNMENT), value=1.0)"),
    ("x.stride(0) == x.shape[1] * stride", "True"),
    ("in tl.range(tl.program_id(0), B * m_tiles", "in tl.range(tl.program_id(0), m_tiles"),
    ("in tl.range(tl.program_id(0),", "in tl.range(1 + tl.program_id(0),"),
    ("tl.num_programs(0), disable_licm", "1 + tl.num_programs(0), disable_licm"),
    ("return N % ALIGNMENT == 0 and not spills", "return not spills"),
    ("100: (weighed and E == 1)", "100: (weighed and E == 0)"),
    ("min(tiles, processors()) if persistent else tiles", "tiles"),
)

GEMM_LAUNCHES = of(
    "kernels/_gemm.py",
    "test_launching.py::test_launches[launches_gemm]",
    ("min(tiles, processors()) if persistent", "processors() if persistent"),
)

DEPENDENT_GEMM = of(
    "kernels/_gemm.py",
    "test_compiling.py::test_compiles[launches_pool_project-90]",
    ("    if DEPENDENT:\n        gdc_wait()\n", ""),
    ("        launch_pdl=dependent,\n", ""),
    ("dtype, gelu).dependent and dependent_launches()", "dtype, gelu).persistent and dependent_launches()"),
)

DEPENDENT_POOLING = of(
    "kernels/pool_tokens.py",
    "test_compiling.py::test_compiles[launches_pool_project-90]",
    ("    if DEPENDENTS:\n        gdc_launch_dependents()\n", ""),
)

POOL_PROJECT = of(
    "kernels/pool_project.py",
    "test_pool_project.py",
    ("gelu=layer < len(weights) - 1", "gelu=layer < len(weights)"),
    ("tokens = buffer.view(1, B * S, -1)", "tokens = buffer.flatten(0, 1).flip(0)[None]"),
    ("x.dtype, gelu=len(weights) > 1", "x.dtype, gelu=False"),
)

POOL_TOKENS_PADDING = of(
    "kernels/pool_tokens.py",
    "test_pool_project.py",
    ("mask=in_s[:, None] & (c < widths[e])[None, :]", "mask=in_s[:, None] & in_c[None, :]"),
)

POOL_PROJECT_FUSE = of(
    "kernels/pool_project_fuse.py",
    "test_pool_project_fuse.py",
    ("weights[L - 1 :: L], biases[L - 1 :: L]", "weights[::L], biases[L - 1 :: L]"),
    ("for w in weights[L - 2 :: L]]", "for w in weights[L - 1 :: L]]"),
    ("(score_vectors[e], sums[:, e])", "(score_vectors[e], sums[:, 0])"),
    ("range(e * L, (e + 1) * L - 2)", "range(e * L, (e + 1) * L - 3)"),
    ("_SCORING.get(query, tensors,", "_SCORING.get(query, tensors[:-1],"),
    ("weights[0].dtype, gelu=L > 1", "weights[0].dtype, gelu=False"),
)

POOL_PROJECT_FUSE_BACKWARD = of(
    "ops/_tail_backward.py",
    "test_pool_project_fuse.py",
    (
        "return backward(passes, *arguments)",
        "return backward(passes, *arguments[:-1], True)",
    ),
)

SCORING = of(
    "kernels/_scoring.py",
    "test_scoring.py",
    ("if (tile >= 0) & (program < first_programs[e + 1]):", "if program < first_programs[e + 1]:"),
    ("in_c = c < widths[e]", "in_c = c < widths[0]"),
    ("range(0, D, DEPTH * BLOCK_D)", "range(0, DEPTH * BLOCK_D, DEPTH * BLOCK_D)"),
    ("d = start + tl.arange(0, DEPTH)[:, None] * BLOCK_D", "d = start + tl.arange(0, DEPTH)[:, None]"),
    ("d.to(tl.int64)[:, :, None] * strides_w[e]", "d[:, :, None] * strides_w[e]"),
    ("* strides_w[e] + c", "* widths[e] + c"),
    ("mask=(d < D)[:, :, None] & in_c, other=0.0", "mask=in_c"),
    ("query_ptr + d, mask=d < D, other=0.0", "query_ptr + d"),
    ("vector_ptr + first_columns[e] + c", "vector_ptr + tile * BLOCK_C + c"),
    ("tl.sum(products) +", "tl.sum(products) -"),
    ("product, mask=tile == 0)", "product, mask=tile > 0)"),
    ("cdiv(width, ALIGNMENT) * ALIGNMENT", "width"),
    ("query.contiguous(), [b.contiguous() for b in biases]", "query, [b.contiguous() for b in biases]"),
    ("[b.contiguous() for b in biases]", "biases"),
    ("else bias.contiguous(),", "else bias,"),
)

OUTER = of(
    "kernels/_outer.py",
    "test_outer.py",
    ("mask=in_d, other=0.0).to(tl.float32)\n    sums", "other=0.0).to(tl.float32)\n    sums"),
    ("in_d, rows = d < D, d.to(tl.int64)[:, None]", "in_d, rows = d < D, d[:, None]"),
    ("in_d, rows = d < D,", "in_d, rows = d <= D,"),
    ("in tl.static_range(E):", "in tl.static_range(1):"),
    ("range(0, widths[e], BLOCK_C)", "range(0, widths[0], BLOCK_C)"),
    ("in_d[:, None] & (c < widths[e])", "in_d[:, None] & (c < BLOCK_C + start)"),
    ("rows * strides_w[e] + c", "rows * widths[e] + c"),
    ("rows * strides_g[e] + c", "rows * widths[e] + c"),
    ("sums += weight.to(tl.float32) * mean", "sums = weight.to(tl.float32) * mean"),
    ("+ query[:, None] * mean", "+ mean"),
    ("        query.contiguous(),\n", "        query,\n"),
    ("[unit_stride(weight) for weight in weights]", "weights"),
)

LAUNCH = of(
    "kernels/_launch.py",
    "test_fuse_encoders.py",
    ("x if x.stride(-1) == 1 else x.contiguous()", "x"),
)

LAUNCH_DEPENDENT = of(
    "kernels/_launch.py",
    "test_pool_project_fuse.py",
    ("return capability() >= 90", "return True"),
)

WEIGHING = of(
    "kernels/_weighing.py",
    "test_fuse_encoders.py",
    ("b * E + e)[:, None] * CHUNKS", "e)[:, None] * CHUNKS"),
    ("mask=chunk[None, :] < counts[:, None]", "mask=chunk[None, :] < CHUNKS"),
    ("for first in range(0, CHUNKS, BLOCK):", "for first in range(0, BLOCK, BLOCK):"),
    ("/ tl.where(e < E, spread(S, e, E), 1).to(tl.float32)", "* 1.0"),
    ("scores - tl.max(scores, 0)", "scores"),
    ("exponentials = tl.where(e < E, tl.exp(scores - tl.max(scores, 0)), 0.0)", "exponentials = tl.exp(scores)"),
    ("tl.arange(0, E_POWER) == e, w", "tl.arange(0, E_POWER) == 0, w"),
    ("means + tl.load(offset_ptr + e,", "means + tl.load(offset_ptr + 0 * e,"),
    ('return tl.where(e < E, scores, float("-inf"))', "return scores"),
)

FUSE_ENCODERS = of(
    "kernels/fuse_encoders.py",
    "test_fuse_encoders.py",
    ("tl.sum(tl.sum(V, 0) * query, 0)", "tl.sum(tl.sum(V, 0), 0)"),
    ("program % (s_tiles * d_tiles) < chunks[e]", "program % (s_tiles * d_tiles) < 1"),
    ("tl.load(query_ptr + d, mask=in_d", "tl.load(query_ptr + d % 256, mask=in_d"),
    ("mask = (s < lengths[e])[:, None]", "mask = (s < lengths[0])[:, None]"),
    ("if program % (s_tiles * d_tiles) == 0:", "if program == 0:"),
    ("pick(w, e, E_POWER) * values[e]", "pick(w, 0, E_POWER) * values[e]"),
    ("stride if length == S else 0 for", "stride for"),
    ("dw + grad_encoder_weights", "dw"),
    ("query.contiguous(),\n        partials", "query,\n        partials"),
    ("bias.contiguous()", "bias"),
    ("[query.contiguous()] * E", "[query] * E"),
    ("values = [unit_stride(value) for value in values]\n    lengths", "lengths"),
    ("G.sum(1, keepdim=True, dtype=torch.float32)", "G.sum(1, keepdim=True)"),
)

BLEND = of(
    "kernels/_blend.py",
    "test_fuse_encoders.py",
    ("return (rest // n).to(tl.int64), rest % n", "return rest // n, rest % n"),
    ("tl.sum(V, 0) / lengths[e]", "tl.sum(V, 0) / lengths[0]"),
    ("(b * s_tiles + s_tile) * columns + first_columns[e]", "(b * s_tiles + s_tile) * columns"),
    ("(b * s_tiles + s_tile) * columns", "s_tile * columns"),
    ("w_ptr + b * E + i % E", "w_ptr + b * E"),
    ("ds_ptr + b * E + i)", "ds_ptr + i)"),
    ("(vector / lengths[i])", "vector"),
    ("if i < SHIFTED:", "if SHIFTED > 0 and i % E < SHIFTED:"),
    ("w = w.contiguous()", "w = w"),
    ("ds.contiguous()", "ds"),
)

TEMPORAL_ATTENTION = of(
    "kernels/temporal_attention.py",
    "test_temporal_attention.py",
    ('return tl.where(top == float("-inf"), 0.0, top)', "return top"),
    ('scores += (tl.where(inside, s, float("-inf")),)', "scores += (s,)"),
    ("            total *= shrink\n", "            total *= 1.0\n"),
    ("p = tl.where(in_i, tl.exp2(dot(q, k) - base) * share, 0.0)", "p = tl.exp2(dot(q, k) - base) * share"),
    ("ds = tl.where(in_i, p * (dot(g, v) - delta), 0.0)", "ds = tl.where(in_i, p * dot(g, v), 0.0)"),
    ("dk = tl.sum(ds[:, :, None] * q, 0) * LN2", "dk = tl.sum(ds[:, :, None] * q, 0)"),
    ("rounded = (dq * (scale * LN2))", "rounded = (dq * LN2)"),
    ("tl.load(sum_ptrs + C, mask=mask, other=0.0) + dv", "dv"),
    ("        delta = delta * shrink + p", "        delta = delta + p"),
    ("    i = program // chunks % blocks * W + tl.arange(0, W)", "    i = tl.arange(0, W)"),
    ("return d**-0.5 / math.log(2)", "return d**-0.5"),
    ("    i = first_query + tl.arange(0, W)", "    i = tl.arange(0, W)"),
    ("row_offset(r, heads, stride_gn, d)", "row_offset(r, heads, heads * d, d)"),
)

FAR_GEMM = of(
    "kernels/_gemm.py",
    "test_far_outputs.py",
    ("(b.to(tl.int64) * S + s)[:, None] * N", "(b * S + s)[:, None] * N"),
)

FAR_BLEND = of(
    "kernels/_blend.py",
    "test_far_outputs.py",
    ("offset = b * strides_ob[i] + s.to(tl.int64)[:, None]", "offset = b * strides_ob[i] + s[:, None]"),
    ("offset = b * strides_ob[i] + s", "offset = b.to(tl.int32) * strides_ob[i] + s"),
)

FAR_POOLING = of(
    "kernels/pool_tokens.py",
    "test_far_outputs.py",
    ("b * stride_ob + s.to(tl.int64)[:, None]", "b * stride_ob + s[:, None]"),
    ("b * stride_ob + s", "b.to(tl.int32) * stride_ob + s"),
)

FAR_SUM = of(
    "kernels/fuse_encoders.py",
    "test_far_outputs.py",
    ("(b * S + s)[:, None] * D", "(b.to(tl.int32) * S + s)[:, None] * D"),
)

FAR_ATTENTION = of(
    "kernels/temporal_attention.py",
    "test_far_outputs.py",
    ("out_row = ((first + i)[:, None]", "out_row = ((first + i).to(tl.int32)[:, None]"),
    ("tl.cast(rows, tl.int64) * (3 * d)", "rows * (3 * d)"),
    ("(first + j) * rows * (2 * d)", "(first + j).to(tl.int32) * rows * (2 * d)"),
    ("(r // heads).to(tl.int64) * stride_n", "(r // heads) * stride_n"),
)

MUTATIONS = [
    *POOL_TOKENS,
    *POOL_TOKENS_PADDING,
    *GEMM,
    *GEMM_LAUNCHES,
    *DEPENDENT_GEMM,
    *DEPENDENT_POOLING,
    *POOL_PROJECT,
    *POOL_PROJECT_FUSE,
    *POOL_PROJECT_FUSE_BACKWARD,
    *SCORING,
    *OUTER,
    *LAUNCH,
    *LAUNCH_DEPENDENT,
    *WEIGHING,
    *FUSE_ENCODERS,
    *BLEND,
    *TEMPORAL_ATTENTION,
    *FAR_GEMM,
    *FAR_BLEND,
    *FAR_POOLING,
    *FAR_SUM,
    *FAR_ATTENTION,
]
