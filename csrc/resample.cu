// resample_frames and resample_normalise on CUDA.
#include "merv_fast/resample.cuh"

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <map>
#include <memory>
#include <mutex>
#include <tuple>
#include <utility>

#include "frames.h"

namespace merv_fast::cuda {
namespace {

void check(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "merv_fast: CUDA error: ", cudaGetErrorString(error));
}

// int32 or uint32 of the host, copied; the copy has ended when this returns, so that any stream may read it.
template <class Integer>
Tensor upload(const std::vector<Integer>& values, const torch::stable::Device& device) {
  const int64_t size = static_cast<int64_t>(values.size());
  const Tensor host = torch::stable::from_blob(
      const_cast<Integer*>(values.data()), {size}, {1},
      torch::stable::Device(torch::headeronly::DeviceType::CPU), torch::headeronly::ScalarType::Int);
  return torch::stable::to(host, device);
}

std::vector<int32_t> narrow(const std::vector<int64_t>& values) { return {values.begin(), values.end()}; }

// The plan of one resize, with its tables on one device.
struct Resize {
  ResizePlan plan;
  ResizeTables tables{};

  Resize(const Frames& frames, int64_t h, int64_t w, Filter filter, const Crop& crop,
         const torch::stable::Device& device)
      : plan(frames.H, frames.W, h, w, filter, crop) {
    tables.across = upload_taps(plan.passes.across, device);
    tables.down = upload_taps(plan.passes.down, device);
    tables.bytes = static_cast<const uint32_t*>(keep(upload(plan.bytes, device)));
  }

 private:
  TapTables upload_taps(const Taps& taps, const torch::stable::Device& device) {
    return {static_cast<const int32_t*>(keep(upload(narrow(taps.start), device))),
            static_cast<const int32_t*>(keep(upload(narrow(taps.count), device))),
            static_cast<const int32_t*>(keep(upload(taps.coefficients, device))), static_cast<int>(taps.width)};
  }

  const void* keep(const Tensor& tensor) {
    kept_.push_back(tensor);
    return tensor.const_data_ptr();
  }

  std::vector<Tensor> kept_;
};

// One table, one reader after another: who finds a table has also launched what reads it before the next one looks.
std::mutex& turn() {
  static auto* const mutex = new std::mutex;
  return *mutex;
}

bool is_captured(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

// The last launch on each stream of each device that reads tables. To wait for these, unlike for a device, is allowed
// while another thread captures a graph.
std::map<std::pair<int32_t, cudaStream_t>, cudaEvent_t>& readers() {
  static auto* const events = new std::map<std::pair<int32_t, cudaStream_t>, cudaEvent_t>;
  return *events;
}

void note_reader(int32_t device, cudaStream_t stream) {
  cudaEvent_t& event = readers()[{device, stream}];
  if (event == nullptr) check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  check(cudaEventRecord(event, stream));
}

// Tables are made once for each size. They are never freed while a kernel may read them: a full cache is emptied
// when all of them have ended, and tables that a graph captures stay for good.
std::shared_ptr<const Resize> resize_for(const Frames& frames, int64_t h, int64_t w, Filter filter, const Crop& crop,
                                         const torch::stable::Device& device, cudaStream_t stream) {
  using Key = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, Filter, int64_t, int64_t, int64_t, int64_t>;
  constexpr size_t kMost = 1024;
  // They outlive the CUDA context.
  static auto* const cache = new std::map<Key, std::shared_ptr<const Resize>>;
  static auto* const captured = new std::map<Key, std::shared_ptr<const Resize>>;
  const Key key{device.index(), frames.H, frames.W,  h,         w,
                filter,         crop.top, crop.left, crop.rows, crop.columns};
  if (const auto found = captured->find(key); found != captured->end()) return found->second;
  if (const auto found = cache->find(key); found != cache->end()) {
    if (is_captured(stream)) captured->insert(*found);
    return found->second;
  }
  STD_TORCH_CHECK(!is_captured(stream), "merv_fast: a size is captured that was not resized to before");
  if (cache->size() >= kMost) {
    for (const auto& [stream, event] : readers()) check(cudaEventSynchronize(event));
    cache->clear();
  }
  return (*cache)[key] = std::make_shared<const Resize>(frames, h, w, filter, crop, device);
}

// A tensor whose frames lie at one distance from each other, their pixels without gaps.
Tensor evenly_spaced(const Tensor& input) {
  const Frames frames(input);
  int64_t stride;
  const bool even = frames.channel_stride == 1 && frames.column_stride == frames.C && frames.evenly_spaced(stride);
  return even ? input : torch::stable::contiguous(input);
}

// The current stream of the tensor's device, and memory that is free again when its work is done.
struct Queue {
  const Tensor& like;
  size_t level_size;
  cudaStream_t stream;
  std::vector<Tensor> spaces;

  Queue(const Tensor& like, size_t level_size) : like(like), level_size(level_size) {
    void* current = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &current) == AOTI_TORCH_SUCCESS,
                    "merv_fast: no current CUDA stream");
    stream = static_cast<cudaStream_t>(current);
  }

  uint8_t* workspace(int64_t bytes) {
    spaces.push_back(torch::stable::new_empty(like, {bytes}));
    return static_cast<uint8_t*>(spaces.back().mutable_data_ptr());
  }

  void launch(const Across& pass) { check(cuda::launch(pass, stream)); }
  void launch(const Down& pass) { check(cuda::launch(pass, level_size, stream)); }
};

void run(const Tensor& input, const std::vector<int64_t>& size, const std::string& method, const Crop& crop,
         uint8_t* out, const Down& last, size_t level_size) {
  const Frames frames(input);
  Queue queue(input, level_size);
  const std::lock_guard<std::mutex> lock(turn());
  const auto found = resize_for(frames, size[0], size[1], filter_of(method), crop, input.device(), queue.stream);
  int64_t frame_stride;
  STD_TORCH_CHECK(frames.evenly_spaced(frame_stride), "merv_fast: frames must be evenly spaced");
  resize(found->plan, found->tables, {frames.data, frames.count, frame_stride, frames.row_stride, frames.W, frames.C},
         out, last, queue);
  if (!is_captured(queue.stream)) note_reader(input.get_device_index(), queue.stream);
}

Tensor resample_frames(Tensor input, std::vector<int64_t> size, std::string method) {
  check_frames(input, size, method);
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  input = evenly_spaced(input);
  const Frames frames(input);
  Tensor output = torch::stable::new_empty(input, frames.with_shape(size[0], size[1], frames.C));
  if (frames.count)
    run(input, size, method, {0, 0, size[0], size[1]}, static_cast<uint8_t*>(output.mutable_data_ptr()), Down{}, 4);
  return output;
}

std::vector<Tensor> resample_normalise(Tensor input, std::vector<int64_t> size, std::string method,
                                       std::vector<int64_t> crop, std::vector<Tensor> levels) {
  check_levels(input, size, method, crop, levels);
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  input = evenly_spaced(input);
  const Frames frames(input);
  // Shared memory holds four pixels of kDownRows rows.
  STD_TORCH_CHECK(frames.C <= kSharedBytes / kDownRows / 4, "resample_normalise: C must be at most ",
                  kSharedBytes / kDownRows / 4, " on CUDA, got ", frames.C);
  std::vector<Tensor> outputs;
  for (Tensor& table : levels) {
    table = torch::stable::contiguous(table);
    outputs.push_back(torch::stable::new_empty(table, frames.with_shape(frames.C, crop[2], crop[3])));
  }
  std::vector<bool> done(levels.size(), frames.count == 0);
  for (size_t first = 0; first < levels.size(); ++first) {
    if (done[first]) continue;
    // Tables of one element size go together; a list of several sizes is resampled once for each.
    Down last{};
    const size_t level_size = levels[first].element_size();
    for (size_t e = first; e < levels.size() && last.tables < kMostTables; ++e) {
      if (done[e] || levels[e].element_size() != level_size) continue;
      last.levels[last.tables] = levels[e].const_data_ptr();
      last.planes[last.tables++] = outputs[e].mutable_data_ptr();
      done[e] = true;
    }
    run(input, size, method, {crop[0], crop[1], crop[2], crop[3]}, nullptr, last, level_size);
  }
  return outputs;
}

}  // namespace
}  // namespace merv_fast::cuda

STABLE_TORCH_LIBRARY_IMPL(merv_fast, CUDA, m) {
  m.impl("resample_frames", TORCH_BOX(&merv_fast::cuda::resample_frames));
  m.impl("resample_normalise", TORCH_BOX(&merv_fast::cuda::resample_normalise));
}
