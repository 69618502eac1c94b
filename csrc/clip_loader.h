// One clip from a source into memory, and worker threads that do it for batches.
#pragma once

#include <condition_variable>
#include <cstdlib>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>

#include "index_cache.h"

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

// Writes uint8[num_frames, out_height, out_width, 3] at `out` and the times of the frames in seconds.
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

// Decodes batches on its own threads. Clips of one file in a batch share an open decoder and its work: a group of
// pictures that several of them need is decoded once, unless they are spread over the threads. Batches come out in the
// order of submission, whichever clip is done first. submit() and next() belong to one thread, close() may come from
// another: next() then returns null. The memory behind the requests must live until its batch is out.
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
  int64_t clips_done() const { return clips_done_; }  // good or not, since the start: tells whether anything moves

 private:
  using Group = std::vector<size_t>;  // clips of one source, by start
  struct Job {
    std::vector<ClipRequest> requests;
    std::vector<Group> groups;
    size_t taken = 0;  // groups that a worker has begun
    size_t done = 0;   // clips
    std::unique_ptr<Batch> batch;
  };
  struct Worker {
    Converter converter;
    std::optional<FileIdentity> file;  // of the decoder, where it may serve later batches
    std::unique_ptr<VideoDecoder> decoder;
  };

  std::vector<Group> groups_of(const std::vector<ClipRequest>& requests) const;
  void work();
  void run(Job& job, const Group& group, Worker& worker);
  void decode(Job& job, const Group& group, Worker& worker);

  const ClipOptions options_;
  const size_t num_threads_;
  std::mutex mutex_;
  std::condition_variable work_ready_;
  std::condition_variable batch_ready_;
  std::deque<std::unique_ptr<Job>> jobs_;
  int64_t num_submitted_ = 0;
  std::atomic<bool> stopping_ = false;
  std::atomic<int64_t> clips_done_ = 0;
  std::vector<std::thread> threads_;
};

}  // namespace pyvdl
