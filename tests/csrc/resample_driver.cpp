// Run a resampling of csrc/include without torch: requests on standard input, results on standard output.
//
// A request is 18 int64 (see main) and the bytes of the frames. "cuda" runs the CUDA functions on the host, block by
// block and thread by thread. Every buffer has exactly its size, so that the address sanitizer sees any step outside.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "merv_fast/resample.cuh"
#include "merv_fast/resample.h"

using namespace merv_fast;

namespace {

using Buffer = std::unique_ptr<uint8_t, decltype(&std::free)>;

Buffer buffer(size_t bytes) { return {static_cast<uint8_t*>(std::malloc(bytes)), &std::free}; }

struct HostQueue {
  std::vector<Buffer> spaces;

  uint8_t* workspace(int64_t bytes) { return spaces.emplace_back(buffer(bytes)).get(); }

  void launch(const cuda::Across& p) {
    if (p.channels != 3 || p.tile_columns == 0) {
      for (int64_t i = 0; i < p.frames * p.rows * p.outputs * p.channels; ++i) cuda::resample_across_sample(p, i);
      return;
    }
    const Buffer shared = buffer(cuda::kAcrossRows * 3 * p.tile_pixels);
    for (int64_t block = 0; block < cuda::across_blocks(p); ++block) {
      std::memset(shared.get(), 0xa5, cuda::kAcrossRows * 3 * p.tile_pixels);
      const cuda::AcrossTile tile = cuda::across_tile(p, block);
      for (int t = 0; t < cuda::kAcrossThreads; ++t) cuda::stage_pixels(p, tile, t, cuda::kAcrossThreads, shared.get());
      for (int t = 0; t < cuda::kAcrossThreads; ++t) cuda::resample_across(p, tile, t, shared.get());
    }
  }

  void launch(const cuda::Down& p) {
    const Buffer shared = buffer(cuda::kDownRows * p.block_pixels * p.channels);
    for (int64_t block = 0; block < cuda::down_blocks(p); ++block) {
      const cuda::DownTile tile = cuda::down_tile(p, block);
      for (int t = 0; t < cuda::kDownThreads; ++t)
        cuda::resample_down_block(p, tile, t, cuda::kDownThreads, shared.get());
      if (p.tables == 0) continue;
      for (int t = 0; t < cuda::kDownThreads; ++t)
        cuda::look_up_block<uint16_t>(p, tile, t, cuda::kDownThreads, shared.get());
    }
  }
};

cuda::TapTables tables_of(const Taps& taps, std::vector<std::vector<int32_t>>& kept) {
  kept.emplace_back(taps.start.begin(), taps.start.end());
  kept.emplace_back(taps.count.begin(), taps.count.end());
  const size_t at = kept.size() - 2;
  return {kept[at].data(), kept[at + 1].data(), taps.coefficients.data(), static_cast<int>(taps.width)};
}

}  // namespace

int main() {
  int64_t request[18];
  while (std::fread(request, sizeof(request), 1, stdin) == 1) {
    const auto [on_cuda, count, H, W, C, h, w, bicubic, top, left, rows, columns, frame_stride, row_stride, offset, bytes,
                with_levels, fits] = request;
    const Filter filter = bicubic ? Filter::bicubic : Filter::bilinear;
    const Crop crop{top, left, rows, columns};
    const Buffer in = buffer(bytes);
    if (std::fread(in.get(), 1, bytes, stdin) != static_cast<size_t>(bytes)) return 1;
    const int64_t samples = rows * columns * C;
    const Buffer out = buffer(count * samples);
    const Buffer planes = buffer(count * samples * 2), others = buffer(count * samples * 2);
    // Level v of channel c is 256 c + v, so that a wrong channel shows, and its complement in another table.
    std::vector<uint16_t> levels(256 * C), complements(256 * C);
    for (size_t i = 0; i < levels.size(); ++i) complements[i] = ~(levels[i] = static_cast<uint16_t>(i));
    if (on_cuda) {
      cuda::ResizePlan plan(H, W, h, w, filter, crop);
      if (plan.passes.horizontal && C == 3 && (plan.tile_columns > 0) != (fits != 0)) return 2;
      std::vector<std::vector<int32_t>> kept;
      kept.reserve(4);
      const cuda::ResizeTables tables{tables_of(plan.passes.across, kept), tables_of(plan.passes.down, kept),
                                      plan.bytes.data()};
      cuda::Down last{};
      if (with_levels) {
        last.tables = 2;
        last.levels[0] = levels.data(), last.levels[1] = complements.data();
        last.planes[0] = planes.get(), last.planes[1] = others.get();
      }
      HostQueue queue;
      cuda::resize(plan, tables, {in.get() + offset, count, frame_stride, row_stride, W, C}, out.get(), last, queue);
    } else {
      const FrameResampler resample(H, W, C, h, w, filter, crop);
      ResampleScratch scratch;
      for (int64_t f = 0; f < count; ++f) {
        resample(in.get() + offset + f * frame_stride, row_stride, C, 1, out.get() + f * samples, scratch);
        look_up_levels(out.get() + f * samples, rows * columns, C, levels.data(),
                       reinterpret_cast<uint16_t*>(planes.get()) + f * samples);
        look_up_levels(out.get() + f * samples, rows * columns, C, complements.data(),
                       reinterpret_cast<uint16_t*>(others.get()) + f * samples);
      }
    }
    if (with_levels)
      for (const Buffer* looked_up : {&planes, &others}) std::fwrite(looked_up->get(), 2, count * samples, stdout);
    else
      std::fwrite(out.get(), 1, count * samples, stdout);
  }
  return 0;
}
