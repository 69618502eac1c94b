// One clip from a source into memory, and worker threads that do it for batches.
#pragma once

#include <condition_variable>
#include <cstdlib>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>

#include "video_decoder.h"

namespace pyvdl {

struct ClipOptions {
  FramePlan frames;  // start_seconds, end_seconds and seed come from the request
  ViewPlan view;     // seed comes from the request
  DecoderOptions decoder;
  std::optional<double> timeout_seconds;

  size_t frame_bytes() const {
    return static_cast<size_t>(view.out_height()) * static_cast<size_t>(view.out_width()) * 3;
  }
  size_t clip_bytes() const { return frame_bytes() * static_cast<size_t>(frames.num_frames); }
};

struct ClipRequest {
  Source source;
  double start_seconds = 0;
  std::optional<double> end_seconds;
  uint64_t seed = 0;
};

// Writes uint8[num_frames, out_height, out_width, 3] at `out` and, where given, the times of the frames in seconds.
void sample_clip(const ClipRequest& request, const ClipOptions& options, const Deadline& deadline, Converter& converter,
                 uint8_t* out, double* pts_seconds, double* durations_seconds);

struct FreeBytes {
  void operator()(uint8_t* p) const { std::free(p); }
};
using AlignedBytes = std::unique_ptr<uint8_t[], FreeBytes>;
AlignedBytes allocate_aligned(size_t bytes);  // at a multiple of 64, which lets JAX use the memory without a copy

struct Batch {
  AlignedBytes data;                // uint8[B, T, H, W, 3]; failed clips are zeros
  std::vector<std::string> errors;  // "stage: message" for each clip, empty for a good one
  std::vector<int64_t> index;       // number of the request
};

// Decodes batches on its own threads. Batches come out in the order of submission, whichever clip is done first.
// submit() and next() belong to one thread, close() may come from another: next() then returns null. The memory behind
// the requests must live until its batch is out.
class ClipLoader {
 public:
  ClipLoader(const ClipOptions& options, int num_threads);
  ~ClipLoader() { close(); }
  ClipLoader(const ClipLoader&) = delete;
  ClipLoader& operator=(const ClipLoader&) = delete;

  void submit(std::vector<ClipRequest> requests);
  // The oldest batch, or null when it is not ready within the time. Requires that one was submitted and not taken.
  std::unique_ptr<Batch> next(std::chrono::milliseconds patience);
  void close();  // stops the work in progress and joins the threads

  const ClipOptions& options() const { return options_; }

 private:
  struct Job {
    std::vector<ClipRequest> requests;
    size_t taken = 0;  // requests that a worker has begun
    size_t done = 0;
    std::unique_ptr<Batch> batch;
  };

  void work();
  void run(Job& job, size_t clip, Converter& converter);

  const ClipOptions options_;
  std::mutex mutex_;
  std::condition_variable work_ready_;
  std::condition_variable batch_ready_;
  std::deque<std::unique_ptr<Job>> jobs_;
  int64_t num_submitted_ = 0;
  std::atomic<bool> stopping_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace pyvdl
