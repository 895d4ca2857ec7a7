// Resampling of 8-bit frames on CUDA, bit-identical to Pillow; the definition is merv_fast/ops/resample_frames.py.
//
// Two launches. Across: a block stages rows x pixels of one frame in shared memory, channel by channel, so that four
// neighbouring samples are one word, and multiplies words by the bytes of the coefficients with dp4a: with
// c = c0 + 256 c1 + 65536 c2 (c0, c1 unsigned, c2 signed), sum c * in is exact modulo 2^32, and it fits int32.
// Down: a thread sums four neighbouring bytes of a column of rows; the block's bytes then go out as they are, or
// through tables of 256 levels, channel by channel.
//
// Bytes, for 32 frames of 720 x 1280 x 3 to 224 x 224: 88.5 MB read and 4.8 MB written (9.6 MB for each bfloat16
// table) are the least; between the launches 15.5 MB are written and read, which fit an L2 cache of 50 MB. Bicubic,
// the first launch does 325 M dp4a for its 355 M products.
//
// Functions marked MERV_FAST_BOTH also compile for the host, where tests run them thread by thread.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "merv_fast/resample_taps.h"

#ifdef __CUDACC__
#define MERV_FAST_BOTH __host__ __device__ __forceinline__
#else
#define MERV_FAST_BOTH inline
#endif

namespace merv_fast::cuda {

constexpr int kChunk = 16;        // pixels of three channels that three 16-byte loads bring
constexpr int kAcrossThreads = 128;
constexpr int kAcrossRows = 8;    // rows of a block
constexpr int kThreadRows = 4;    // rows of a thread: each coefficient is loaded once for all of them
constexpr int kAcrossColumns = kAcrossThreads * kThreadRows / kAcrossRows;
constexpr int kDownThreads = 256;
constexpr int kDownRows = 4;
constexpr int kDownBytes = 1024;  // of a row in a block, at most, but at least four pixels
constexpr int kSharedBytes = 48 << 10;
constexpr int kMostTables = 8;

struct alignas(16) Word4 {
  uint32_t x, y, z, w;
};

MERV_FAST_BOTH int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

MERV_FAST_BOTH uint8_t round_level(uint32_t sum) {
  const int32_t value = static_cast<int32_t>(sum) >> kPrecision;
  return static_cast<uint8_t>(value < 0 ? 0 : value > 255 ? 255 : value);
}

MERV_FAST_BOTH uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t order) {
#ifdef __CUDA_ARCH__
  return __byte_perm(a, b, order);
#else
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) out |= static_cast<uint32_t>(bytes >> 8 * (order >> 4 * i & 7) & 0xff) << 8 * i;
  return out;
#endif
}

MERV_FAST_BOTH uint32_t dot_unsigned(uint32_t samples, uint32_t bytes, uint32_t sum) {
#ifdef __CUDA_ARCH__
  return __dp4a(samples, bytes, sum);
#else
  for (int i = 0; i < 32; i += 8) sum += (samples >> i & 0xff) * (bytes >> i & 0xff);
  return sum;
#endif
}

MERV_FAST_BOTH uint32_t dot_signed(uint32_t samples, uint32_t bytes, uint32_t sum) {
#ifdef __CUDA_ARCH__
  int32_t out;
  asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(out) : "r"(samples), "r"(bytes), "r"(sum));
  return static_cast<uint32_t>(out);
#else
  for (int i = 0; i < 32; i += 8) sum += (samples >> i & 0xff) * static_cast<uint32_t>(static_cast<int8_t>(bytes >> i));
  return sum;
#endif
}

// The Taps of a pass where the kernels can read them.
struct TapTables {
  const int32_t *start, *count, *coefficients;  // [outputs], [outputs], [outputs, width]
  int width;
};

// The horizontal pass. Rows of the input are packed pixels.
struct Across : TapTables {
  const uint8_t* in;
  int64_t frame_stride, row_stride;
  int64_t frames, rows, row_pixels;  // row_pixels may be read from `in` on
  int channels, outputs;
  uint8_t* out;  // [frames, rows, outputs, channels]
  // Of three channels only, with the samples of a tile of outputs in shared memory:
  const uint32_t* bytes;  // [words, 3, outputs], from sample start & ~3 on
  int words, tile_columns, tile_pixels;
  bool aligned;  // every row starts at a multiple of 16 bytes
};

struct AcrossTile {
  int64_t frame, row;
  int column, columns, origin;  // first output and their number, first pixel in shared memory
};

MERV_FAST_BOTH int64_t across_blocks(const Across& p) {
  return p.frames * ceil_div(p.rows, kAcrossRows) * ceil_div(p.outputs, p.tile_columns);
}

MERV_FAST_BOTH AcrossTile across_tile(const Across& p, int64_t block) {
  const int64_t tiles = ceil_div(p.outputs, p.tile_columns), groups = ceil_div(p.rows, kAcrossRows);
  AcrossTile tile;
  tile.column = static_cast<int>(block % tiles) * p.tile_columns;
  tile.columns = p.outputs - tile.column < p.tile_columns ? p.outputs - tile.column : p.tile_columns;
  tile.row = block / tiles % groups * kAcrossRows;
  tile.frame = block / tiles / groups;
  tile.origin = p.start[tile.column] & ~(kChunk - 1);
  return tile;
}

// A thread's share of the samples: shared [kAcrossRows, 3, tile_pixels].
MERV_FAST_BOTH void stage_pixels(const Across& p, const AcrossTile& tile, int thread, int threads, uint8_t* shared) {
  const int chunks = p.tile_pixels / kChunk;
  for (int item = thread; item < kAcrossRows * chunks; item += threads) {
    const int r = item / chunks, x = item % chunks * kChunk;
    if (tile.row + r >= p.rows) return;
    const int64_t pixel = tile.origin + x;
    const uint8_t* from = p.in + tile.frame * p.frame_stride + (tile.row + r) * p.row_stride + pixel * 3;
    uint32_t words[12];
    if (p.aligned && pixel + kChunk <= p.row_pixels) {
      for (int i = 0; i < 3; ++i) {
        const Word4 four = *reinterpret_cast<const Word4*>(from + 16 * i);
        words[4 * i] = four.x, words[4 * i + 1] = four.y, words[4 * i + 2] = four.z, words[4 * i + 3] = four.w;
      }
    } else {
      for (int i = 0; i < 12; ++i) {
        words[i] = 0;
        for (int b = 0; b < 4; ++b)
          if (pixel + (4 * i + b) / 3 < p.row_pixels) words[i] |= static_cast<uint32_t>(from[4 * i + b]) << 8 * b;
      }
    }
    Word4 planes[3];
    uint32_t* plane_words = reinterpret_cast<uint32_t*>(planes);
    for (int i = 0; i < 4; ++i) {
      const uint32_t a = words[3 * i], b = words[3 * i + 1], c = words[3 * i + 2];
      plane_words[i] = permute_bytes(permute_bytes(a, b, 0x0630), c, 0x5210);
      plane_words[4 + i] = permute_bytes(permute_bytes(a, b, 0x0741), c, 0x6210);
      plane_words[8 + i] = permute_bytes(permute_bytes(a, b, 0x0052), c, 0x7410);
    }
    for (int c = 0; c < 3; ++c) *reinterpret_cast<Word4*>(shared + (r * 3 + c) * p.tile_pixels + x) = planes[c];
  }
}

// A thread's outputs: one column, kThreadRows rows, three channels.
MERV_FAST_BOTH void resample_across(const Across& p, const AcrossTile& tile, int thread, const uint8_t* shared) {
  const int column = thread % p.tile_columns, first = thread / p.tile_columns * kThreadRows;
  if (column >= tile.columns || first >= kAcrossRows) return;
  const int output = tile.column + column, tile_words = p.tile_pixels / 4;
  const uint32_t* samples = reinterpret_cast<const uint32_t*>(shared) + first * 3 * tile_words +
                            ((p.start[output] & ~3) - tile.origin) / 4;
  uint32_t sum[kThreadRows * 3][3] = {};
  for (int k = 0; k < p.words; ++k) {
    const uint32_t* bytes = p.bytes + k * 3 * static_cast<int64_t>(p.outputs) + output;
    const uint32_t c0 = bytes[0], c1 = bytes[p.outputs], c2 = bytes[2 * p.outputs];
    for (int i = 0; i < kThreadRows * 3; ++i) {
      const uint32_t word = samples[i * tile_words + k];
      sum[i][0] = dot_unsigned(word, c0, sum[i][0]);
      sum[i][1] = dot_unsigned(word, c1, sum[i][1]);
      sum[i][2] = dot_signed(word, c2, sum[i][2]);
    }
  }
  for (int r = 0; r < kThreadRows; ++r) {
    const int64_t row = tile.row + first + r;
    if (row >= p.rows) return;
    uint8_t* to = p.out + ((tile.frame * p.rows + row) * p.outputs + output) * 3;
    for (int c = 0; c < 3; ++c) {
      const uint32_t* s = sum[r * 3 + c];
      to[c] = round_level((1u << (kPrecision - 1)) + s[0] + (s[1] << 8) + (s[2] << 16));
    }
  }
}

// One output sample of any number of channels, straight from global memory.
MERV_FAST_BOTH void resample_across_sample(const Across& p, int64_t index) {
  const int c = static_cast<int>(index % p.channels), output = static_cast<int>(index / p.channels % p.outputs);
  const int64_t row = index / p.channels / p.outputs;
  const uint8_t* from = p.in + row / p.rows * p.frame_stride + row % p.rows * p.row_stride +
                        static_cast<int64_t>(p.start[output]) * p.channels + c;
  uint32_t sum = 1u << (kPrecision - 1);
  for (int k = 0; k < p.count[output]; ++k)
    sum += static_cast<uint32_t>(p.coefficients[static_cast<int64_t>(output) * p.width + k]) *
           from[static_cast<int64_t>(k) * p.channels];
  p.out[index] = round_level(sum);
}

// The vertical pass. Without taps (start is null) it only copies, or looks up.
struct Down : TapTables {
  const uint8_t* in;
  int64_t frame_stride, row_stride;
  int64_t frames, pixels;  // pixels of a row
  int channels, outputs;
  uint8_t* out;  // [frames, outputs, pixels, channels], if there are no tables
  int tables;
  const void* levels[kMostTables];  // [channels, 256]
  void* planes[kMostTables];        // [frames, channels, outputs, pixels]
  int block_pixels;
  bool words;  // rows start at multiples of four bytes, and so do blocks
};

struct DownTile {
  int64_t frame, pixel;
  int row, rows, pixels;
};

MERV_FAST_BOTH int64_t down_blocks(const Down& p) {
  return p.frames * ceil_div(p.outputs, kDownRows) * ceil_div(p.pixels, p.block_pixels);
}

MERV_FAST_BOTH DownTile down_tile(const Down& p, int64_t block) {
  const int64_t tiles = ceil_div(p.pixels, p.block_pixels), groups = ceil_div(p.outputs, kDownRows);
  DownTile tile;
  tile.pixel = block % tiles * p.block_pixels;
  tile.pixels = static_cast<int>(p.pixels - tile.pixel < p.block_pixels ? p.pixels - tile.pixel : p.block_pixels);
  tile.row = static_cast<int>(block / tiles % groups) * kDownRows;
  tile.rows = p.outputs - tile.row < kDownRows ? p.outputs - tile.row : kDownRows;
  tile.frame = block / tiles / groups;
  return tile;
}

// `lanes` neighbouring bytes of one output row, to `to`.
template <int lanes>
MERV_FAST_BOTH void resample_down(const Down& p, const uint8_t* column, int output, uint8_t* to) {
  const int start = p.start ? p.start[output] : output, count = p.start ? p.count[output] : 1;
  const uint8_t* from = column + start * p.row_stride;
  uint32_t sum[lanes];
  for (int i = 0; i < lanes; ++i) sum[i] = 1u << (kPrecision - 1);
  for (int k = 0; k < count; ++k) {
    const uint32_t c = p.start ? p.coefficients[static_cast<int64_t>(output) * p.width + k] : 1u << kPrecision;
    if constexpr (lanes == 4) {
      const uint32_t word = *reinterpret_cast<const uint32_t*>(from + k * p.row_stride);
      for (int i = 0; i < 4; ++i) sum[i] += c * (word >> 8 * i & 0xff);
    } else {
      sum[0] += c * from[k * p.row_stride];
    }
  }
  if constexpr (lanes == 4) {
    uint32_t word = 0;
    for (int i = 0; i < 4; ++i) word |= static_cast<uint32_t>(round_level(sum[i])) << 8 * i;
    *reinterpret_cast<uint32_t*>(to) = word;
  } else {
    to[0] = round_level(sum[0]);
  }
}

// A thread's bytes of the block: to shared [kDownRows, block_pixels, channels], or to `out` if there are no tables.
MERV_FAST_BOTH void resample_down_block(const Down& p, const DownTile& tile, int thread, int threads,
                                        uint8_t* shared) {
  const int lanes = p.words ? 4 : 1, row_bytes = tile.pixels * p.channels, items = row_bytes / lanes;
  for (int item = thread; item < items * tile.rows; item += threads) {
    const int r = item / items, offset = item % items * lanes;
    const int64_t byte = tile.pixel * p.channels + offset;
    const uint8_t* column = p.in + tile.frame * p.frame_stride + byte;
    uint8_t* to = p.tables ? shared + r * p.block_pixels * p.channels + offset
                           : p.out + (tile.frame * p.outputs + tile.row + r) * p.pixels * p.channels + byte;
    if (p.words)
      resample_down<4>(p, column, tile.row + r, to);
    else
      resample_down<1>(p, column, tile.row + r, to);
  }
}

// A thread's share of the look-ups: neighbouring threads write neighbouring pixels of a plane.
template <class Level>
MERV_FAST_BOTH void look_up_block(const Down& p, const DownTile& tile, int thread, int threads,
                                  const uint8_t* shared) {
  for (int item = thread; item < tile.pixels * tile.rows * p.channels; item += threads) {
    const int x = item % tile.pixels, r = item / tile.pixels % tile.rows, c = item / tile.pixels / tile.rows;
    const int byte = c * 256 + shared[(r * p.block_pixels + x) * p.channels + c];
    const int64_t to = ((tile.frame * p.channels + c) * p.outputs + tile.row + r) * p.pixels + tile.pixel + x;
    for (int e = 0; e < p.tables; ++e)
      static_cast<Level*>(p.planes[e])[to] = static_cast<const Level*>(p.levels[e])[byte];
  }
}

// The words of coefficient bytes of a pass, [words, 3, outputs].
inline std::vector<uint32_t> coefficient_bytes(const Taps& taps, int& words) {
  const int64_t outputs = static_cast<int64_t>(taps.start.size());
  words = 0;
  for (int64_t j = 0; j < outputs; ++j)
    words = std::max<int>(words, static_cast<int>(ceil_div(taps.start[j] % 4 + taps.count[j], 4)));
  std::vector<uint32_t> bytes(words * 3 * outputs, 0);
  for (int64_t j = 0; j < outputs; ++j)
    for (int64_t k = 0; k < taps.count[j]; ++k) {
      const int64_t sample = taps.start[j] % 4 + k;
      const uint32_t c = static_cast<uint32_t>(taps.coefficients[j * taps.width + k]);
      for (int part = 0; part < 3; ++part)
        bytes[(sample / 4 * 3 + part) * outputs + j] |= (c >> 8 * part & 0xff) << sample % 4 * 8;
    }
  return bytes;
}

// A resize as the kernels want it, on the host.
struct ResizePlan {
  Passes passes;
  std::vector<uint32_t> bytes;
  int words = 0, tile_columns = 0, tile_pixels = 0;  // tile_columns is 0 where no tile fits into shared memory

  ResizePlan(int64_t H, int64_t W, int64_t h, int64_t w, Filter filter, const Crop& crop)
      : passes(plan_passes(H, W, h, w, filter, crop)) {
    if (!passes.horizontal) return;
    // The window starts at a chunk, so that its rows stay as aligned as the frame's.
    const int64_t before = passes.left % kChunk;
    passes.left -= before;
    passes.columns += before;
    for (int64_t& start : passes.across.start) start += before;
    bytes = coefficient_bytes(passes.across, words);
    choose_tile();
  }

 private:
  void choose_tile() {
    const std::vector<int64_t>& start = passes.across.start;
    const int outputs = static_cast<int>(start.size());
    const int most = static_cast<int>(ceil_div(outputs, ceil_div(outputs, kAcrossColumns)));
    for (tile_columns = most; tile_columns > 0; tile_columns /= 2) {
      int64_t pixels = 0;
      for (int first = 0; first < outputs; first += tile_columns) {
        const int last = std::min(first + tile_columns, outputs) - 1;
        pixels = std::max(pixels, start[last] / 4 * 4 + 4 * words - start[first] / kChunk * kChunk);
      }
      pixels = ceil_div(pixels, kChunk) * kChunk;
      tile_pixels = static_cast<int>(pixels);
      if (pixels * 3 * kAcrossRows <= kSharedBytes) return;
    }
  }
};

// What of a plan the kernels read, on their device.
struct ResizeTables {
  TapTables across, down;
  const uint32_t* bytes;
};

// Frames whose pixels lie without gaps in their rows.
struct Pictures {
  const uint8_t* data;
  int64_t count, frame_stride, row_stride, W, C;
};

// Launch the passes on `queue`, which also hands out memory between them: to `out`, or through the tables of `last`.
template <class Queue>
void resize(const ResizePlan& plan, const ResizeTables& tables, const Pictures& pictures, uint8_t* out, Down last,
            Queue& queue) {
  const Passes& passes = plan.passes;
  const Crop& crop = passes.crop;
  const int64_t C = pictures.C;
  // What the next pass reads.
  const uint8_t* in = pictures.data + passes.top * pictures.row_stride + passes.left * C;
  int64_t frame_stride = pictures.frame_stride, row_stride = pictures.row_stride;
  int64_t rows = passes.rows, pixels = passes.columns, row_pixels = pictures.W - passes.left;

  const auto go_across = [&](uint8_t* to) {
    Across pass{};
    static_cast<TapTables&>(pass) = tables.across;
    pass.in = in, pass.frame_stride = frame_stride, pass.row_stride = row_stride;
    pass.frames = pictures.count, pass.rows = rows, pass.row_pixels = row_pixels;
    pass.channels = static_cast<int>(C), pass.outputs = static_cast<int>(crop.columns);
    pass.bytes = tables.bytes;
    pass.words = plan.words, pass.tile_columns = plan.tile_columns, pass.tile_pixels = plan.tile_pixels;
    pass.aligned = reinterpret_cast<uintptr_t>(in) % 16 == 0 && row_stride % 16 == 0 && frame_stride % 16 == 0;
    pass.out = to;
    queue.launch(pass);
  };
  const auto go_down = [&](Down pass, const TapTables& taps, uint8_t* to) {
    static_cast<TapTables&>(pass) = taps;
    pass.in = in, pass.frame_stride = frame_stride, pass.row_stride = row_stride;
    pass.frames = pictures.count, pass.pixels = pixels;
    pass.channels = static_cast<int>(C), pass.outputs = static_cast<int>(crop.rows);
    pass.block_pixels = std::max(kDownBytes / pass.channels / 4 * 4, 4);
    pass.words = pixels * C % 4 == 0 && row_stride % 4 == 0 && frame_stride % 4 == 0 &&
                 reinterpret_cast<uintptr_t>(in) % 4 == 0;
    pass.out = to;
    queue.launch(pass);
  };
  const auto between = [&](int64_t new_rows, int64_t new_pixels) {
    return queue.workspace(pictures.count * new_rows * new_pixels * C);
  };
  const auto read_next = [&](const uint8_t* from, int64_t new_rows, int64_t new_pixels) {
    in = from, rows = new_rows, pixels = row_pixels = new_pixels;
    row_stride = pixels * C, frame_stride = rows * row_stride;
  };

  TapTables taps_left = passes.vertical ? tables.down : TapTables{};
  if (passes.vertical && passes.horizontal && passes.vertical_first) {
    uint8_t* space = between(crop.rows, pixels);
    go_down(Down{}, taps_left, space);
    read_next(space, crop.rows, pixels);
    taps_left = {};
  }
  if (passes.horizontal) {
    if (!taps_left.start && last.tables == 0) return go_across(out);
    uint8_t* space = between(rows, crop.columns);
    go_across(space);
    read_next(space, rows, crop.columns);
  }
  go_down(last, taps_left, out);
}

#ifdef __CUDACC__

__global__ void __launch_bounds__(kAcrossThreads) across_kernel(const Across p) {
  extern __shared__ Word4 shared[];
  const AcrossTile tile = across_tile(p, blockIdx.x);
  stage_pixels(p, tile, threadIdx.x, kAcrossThreads, reinterpret_cast<uint8_t*>(shared));
  __syncthreads();
  resample_across(p, tile, threadIdx.x, reinterpret_cast<const uint8_t*>(shared));
}

__global__ void across_samples_kernel(const Across p) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index < p.frames * p.rows * p.outputs * p.channels) resample_across_sample(p, index);
}

template <class Level>
__global__ void __launch_bounds__(kDownThreads) down_kernel(const Down p) {
  extern __shared__ Word4 shared[];
  const DownTile tile = down_tile(p, blockIdx.x);
  resample_down_block(p, tile, threadIdx.x, kDownThreads, reinterpret_cast<uint8_t*>(shared));
  if (p.tables == 0) return;
  __syncthreads();
  look_up_block<Level>(p, tile, threadIdx.x, kDownThreads, reinterpret_cast<const uint8_t*>(shared));
}

inline cudaError_t launch(const Across& p, cudaStream_t stream) {
  if (p.channels == 3 && p.tile_columns > 0) {
    const auto blocks = static_cast<unsigned>(across_blocks(p));
    across_kernel<<<blocks, kAcrossThreads, kAcrossRows * 3 * p.tile_pixels, stream>>>(p);
  } else {
    const int64_t samples = p.frames * p.rows * p.outputs * p.channels;
    across_samples_kernel<<<static_cast<unsigned>(ceil_div(samples, 256)), 256, 0, stream>>>(p);
  }
  return cudaGetLastError();
}

inline cudaError_t launch(const Down& p, size_t level_size, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(down_blocks(p));
  const int bytes = p.tables ? kDownRows * p.block_pixels * p.channels : 0;
  if (level_size == 2)
    down_kernel<uint16_t><<<blocks, kDownThreads, bytes, stream>>>(p);
  else if (level_size == 4)
    down_kernel<uint32_t><<<blocks, kDownThreads, bytes, stream>>>(p);
  else
    down_kernel<uint64_t><<<blocks, kDownThreads, bytes, stream>>>(p);
  return cudaGetLastError();
}

#endif

}  // namespace merv_fast::cuda
