"""The changes that `mutate` makes to the native code, each one line that the tests must notice."""

from tests.mutate import Mutation

__all__ = ["MUTATIONS"]


def of(file: str, tests: str, *changes: tuple[str, str], library: bool = True) -> list[Mutation]:
    return [Mutation(f"csrc/{file}", tests, old, new, library) for old, new in changes]


def header(file: str, tests: str, *changes: tuple[str, str], library: bool = False) -> list[Mutation]:
    """Changes to a header, which ``tests`` compile themselves unless they use the ``library``."""
    return of(f"include/merv_fast/{file}", tests, *changes, library=library)


POOL_TESTS = "csrc/test_native.py ops/test_pool_tokens.py"
FUSE_TESTS = "csrc/test_native.py ops/test_fuse_encoders.py"
FRAMES_TESTS = "csrc/test_native.py ops/test_resample_frames.py ops/test_resample_normalise.py"

POOL = header(
    "pool.h",
    POOL_TESTS,
    (": begin(index * size / count)", ": begin((index * size + count - 1) / count)"),
    ("end(((index + 1) * size + count - 1) / count)", "end((index + 1) * size / count)"),
    ("(slots.end - slots.begin) * (rows.end", "(rows.end"),
    ("if (first < s.C) block", "if (first + 1 < s.C) block"),
    ("* s.token_stride + first;", "* s.token_stride;"),
    ("out[first + c]", "out[c]"),
    ("slot * s.slot_stride", "slot * s.H * s.W * s.token_stride"),
    ("x + b * s.video_stride", "x + b * s.T * s.slot_stride"),
    library=True,
)

POOL_BINDING = of(
    "pool_tokens.cpp",
    POOL_TESTS,
    ("grid[0] * grid[1] == input.size(2)", "grid[0] * grid[1] <= input.size(2)"),
    ("grid[0] >= 1 && grid[1] >= 1 && grid[0] *", "grid[0] *"),
    ("out_grid[0] >= 1 && out_grid[1] >= 1 &&", "out_grid[0] >= 1 &&"),
    ("input.stride(3) == 1 ? input : torch::stable::contiguous(input)", "input"),
)

FUSE = header(
    "fuse.h",
    FUSE_TESTS,
    ("s < std::min(first + 32, values.tokens)", "s < first + 32"),
    ("total[c] += sum[c]", "total[c] = sum[c]"),
    ("if (first < D) block", "if (first + 1 < D) block"),
    ("(values[e].tokens == 1 ? 0 : s", "(values[0].tokens == 1 ? 0 : s"),
    ("out + s * D", "out + (s - begin) * D"),
    ("std::exp(scores[e] - most)", "std::exp(scores[e])"),
    library=True,
)

FUSE_BINDING = of(
    "fuse_encoders.cpp",
    FUSE_TESTS,
    ("+ b * values[e].stride(0)", "+ b * values[e].size(1) * values[e].stride(1)"),
    ("      part.data += first;\n", ""),
    ("std::max<int64_t>(begin - b * S, 0)", "begin"),
    ("value.size(0) == values[0].size(0) &&", ""),
    ("value.dim() == 3 &&", ""),
    ("query.dim() == 1 &&", ""),
    ("bias.dim() == 1 &&", ""),
    ("  bias = torch::stable::contiguous(bias);\n", ""),
)

ELEMENTS = header(
    "elements.h",
    "csrc/test_elements.py",
    ("rounded = bits + 0x7fff + (bits >> 16 & 1)", "rounded = bits + 0x8000"),
    ("x == x ? rounded >> 16 : 0x7fc0", "rounded >> 16"),
    ("magnitude >= 0x7c00u << 13", "magnitude > 0x7c00u << 13"),
    ("bits_of(float_of(magnitude) * 0x1p112f)", "(magnitude + (magnitude ? 0x38000000 : 0))"),
    ("u < 0x38800000", "u < 0x38000000"),
    ("+ 0xfff + (u >> 13 & 1)", "+ 0x1000"),
)

DOUBLE = header(
    "elements.h",
    "csrc/test_native.py",
    ("using type = double;", "using type = float;"),
    library=True,
)

TAPS = header(
    "resample_taps.h",
    "csrc/test_resample.py",
    ("- 4.0) * -0.5;", "- 4.0) * -0.75;"),
    ("filter == Filter::bilinear ? 1.0 : 2.0", "filter == Filter::bilinear ? 1.0 : 1.5"),
    ("static_cast<int64_t>(centre + reach + 0.5), n)", "static_cast<int64_t>(centre + reach + 0.5), n + 1)"),
    ("taps.width = std::max(taps.width, taps.count[j])", "taps.width = taps.count[j]"),
    ("weights[k] / total", "weights[k] * shrink"),
    ("share >= 0 ? 0.5 : -0.5", "0.5"),
    ("length = last - first;", "length = last;"),
    ("H - h > std::max<int64_t>(0, 2 * (W - w))", "H - h >= std::max<int64_t>(0, 2 * (W - w))"),
    ("std::max<int64_t>(0, 2 * (W - w))", "2 * (W - w)"),
)

RESAMPLE = header(
    "resample.h",
    "csrc/test_resample.py",
    ("pairs((taps.width + 1) / 2)", "pairs(taps.width / 2)"),
    ("x + 6 <= n", "x + 4 <= n"),
    ("c < lanes ? in[x * C + c]", "lanes > 0 ? in[x * C + c]"),
    ("value = value > 255 ?", "value = value > 256 ?"),
    ("row = in + k * in_stride + x;", "row = in + k * in_stride;"),
    ("in + y * row_stride, out_stride);", "in + y * out_stride, out_stride);"),
    ("slack = 3;", "slack = 0;"),
    ("int64_t c = (C_ - 1) / 4 * 4; c >= 0; c -= 4", "int64_t c = 0; c < C_; c += 4"),
    ("&taps.coefficients[i * taps.width]", "&taps.coefficients[i * taps.count[i]]"),
    ("levels[c * 256 + bytes[i * C + c]]", "levels[bytes[i * C + c]]"),
)

STRIDES = header(
    "resample.h",
    FRAMES_TESTS,
    ("channel_stride != 1 || column_stride != C_", "channel_stride != 1"),
    library=True,
)

CUDA = header(
    "resample.cuh",
    "csrc/test_resample.py",
    ("value < 0 ? 0 : value > 255", "value > 255"),
    ("p.outputs - tile.column < p.tile_columns ? p.outputs - tile.column : p.tile_columns", "p.tile_columns"),
    ("p.start[tile.column] & ~(kChunk - 1)", "p.start[tile.column] & ~3"),
    ("if (tile.row + r >= p.rows) return;", "if (tile.row + r > p.rows) return;"),
    ("pixel + kChunk <= p.row_pixels", "pixel < p.row_pixels"),
    ("if (p.aligned && pixel", "if (pixel"),
    ("if (column >= tile.columns || first >= kAcrossRows) return;", "if (first >= kAcrossRows) return;"),
    ("row / p.rows * p.frame_stride + row % p.rows * p.row_stride", "row * p.row_stride"),
    ("p.pixels - tile.pixel < p.block_pixels ? p.pixels - tile.pixel : p.block_pixels", "p.block_pixels"),
    ("* p.pixels + tile.pixel + x;", "* p.pixels + x;"),
    ("static_cast<const Level*>(p.levels[e])", "static_cast<const Level*>(p.levels[0])"),
    ("ceil_div(taps.start[j] % 4 + taps.count[j], 4)", "ceil_div(taps.count[j], 4)"),
    ("    for (int64_t& start : passes.across.start) start += before;\n", ""),
    ("pixels * 3 * kAcrossRows <= kSharedBytes", "pixels * kAcrossRows <= kSharedBytes"),
    ("row_pixels = pictures.W - passes.left;", "row_pixels = pictures.W;"),
    ("row_stride % 16 == 0 && frame_stride % 16 == 0;", "row_stride % 16 == 0;"),
    ("pixels * C % 4 == 0 && row_stride % 4 == 0 &&", "pixels * C % 4 == 0 &&"),
)

RESAMPLE_BINDING = of(
    "resample.cpp",
    FRAMES_TESTS,
    ("out + f * h * w * frames.C", "out + (f - begin) * h * w * frames.C"),
    ("tables.push_back(torch::stable::contiguous(level))", "tables.push_back(level)"),
    ("look_up(plane, f,", "look_up(plane, f - begin,"),
)

FRAMES = of(
    "frames.h",
    FRAMES_TESTS,
    ("size[0] >= 1 && size[1] >= 1", "size[0] >= 1"),
    ("d < frames.dim(); ++d", "d < frames.dim() - 1; ++d"),
    ("crop[0] >= 0 && crop[1] >= 0 &&", "crop[0] >= 0 &&"),
    ("crop[2] >= 1 && crop[3] >= 1 &&", "crop[2] >= 1 &&"),
    ("crop[0] + crop[2] <= size[0] && ", ""),
    ("<= size[0] && crop[1] + crop[3] <= size[1]", "<= size[0]"),
    ("level.dim() == 2 &&", ""),
    ("      index /= lead[d];\n", ""),
)

SPACING = header(
    "spacing.h",
    "csrc/test_spacing.py",
    ("    if (sizes[d] == 1) continue;\n", ""),
    ("if (count == 1) stride = strides[d];", "stride = strides[d];"),
    ("strides[d] != count * stride", "strides[d] < count * stride"),
    ("count *= sizes[d];", "count = sizes[d];"),
)

MUTATIONS = [
    *POOL,
    *POOL_BINDING,
    *FUSE,
    *FUSE_BINDING,
    *ELEMENTS,
    *DOUBLE,
    *TAPS,
    *RESAMPLE,
    *STRIDES,
    *CUDA,
    *RESAMPLE_BINDING,
    *FRAMES,
    *SPACING,
]
