#include "clip_loader.h"

#include <algorithm>
#include <cstring>

namespace pyvdl {
namespace {

constexpr size_t kAlignment = 64;

}  // namespace

void sample_clip(const ClipRequest& request, const ClipOptions& options, const Deadline& deadline, Converter& converter,
                 uint8_t* out, double* pts_seconds, double* durations_seconds) {
  VideoDecoder decoder(request.source, options.decoder, deadline);
  const PacketIndex& index = decoder.index();
  FramePlan frames = options.frames;
  frames.start_seconds = request.start_seconds;
  frames.end_seconds = request.end_seconds;
  frames.seed = request.seed;
  ViewPlan view = options.view;
  view.seed = request.seed;

  const Timeline timeline = index.timeline();
  if (decoder.truncated() && !options.decoder.conceal &&
      request.end_seconds.value_or(timeline.end + 1) > timeline.end) {
    throw Error("read", "the file is cut off: " + std::to_string(index.num_frames()) + " frames of it are there");
  }
  try {
    const std::vector<int64_t> plan = plan_frames(timeline, frames);
    std::vector<int64_t> ranks = plan;
    std::sort(ranks.begin(), ranks.end());
    ranks.erase(std::unique(ranks.begin(), ranks.end()), ranks.end());

    const size_t bytes = options.frame_bytes();
    const auto slot_of = [&](int64_t rank) {
      return out + bytes * static_cast<size_t>(std::find(plan.begin(), plan.end(), rank) - plan.begin());
    };
    decoder.decode(ranks, [&](int64_t rank, const AVFrame& frame) {
      const Orientation orientation = decoder.orientation();
      const int width = upright_width(frame.width, frame.height, orientation);
      const int height = upright_height(frame.width, frame.height, orientation);
      const View shown = plan_view(width, height, view);
      const int64_t pixels = int64_t{shown.resized_width} * shown.resized_height;
      if (pixels > options.decoder.limits.max_pixels) {
        throw Error("limits", "the resized picture of " + std::to_string(shown.resized_width) + "x" +
                                  std::to_string(shown.resized_height) +
                                  " exceeds max_pixels = " + std::to_string(options.decoder.limits.max_pixels));
      }
      converter.convert(frame, orientation, shown, slot_of(rank));
      decoder.count_converted();
    });
    for (size_t i = 0; i < plan.size(); ++i) {
      const auto rank = static_cast<size_t>(plan[i]);
      uint8_t* const slot = out + bytes * i;
      if (const uint8_t* const first = slot_of(plan[i]); first != slot) std::memcpy(slot, first, bytes);
      if (pts_seconds) pts_seconds[i] = index.pts_seconds()[rank];
      if (durations_seconds) durations_seconds[i] = index.durations_seconds()[rank];
    }
  } catch (const SamplingError& error) {
    throw Error("sample", error.what());
  }
}

AlignedBytes allocate_aligned(size_t bytes) {
  const size_t rounded = std::max<size_t>(1, (bytes + kAlignment - 1) / kAlignment) * kAlignment;
  AlignedBytes result(static_cast<uint8_t*>(std::aligned_alloc(kAlignment, rounded)));
  if (!result) throw std::bad_alloc();
  return result;
}

ClipLoader::ClipLoader(const ClipOptions& options, int num_threads) : options_(options) {
  for (int i = 0; i < num_threads; ++i) threads_.emplace_back([this] { work(); });
}

void ClipLoader::submit(std::vector<ClipRequest> requests) {
  auto job = std::make_unique<Job>();
  job->batch = std::make_unique<Batch>();
  job->batch->data = allocate_aligned(options_.clip_bytes() * requests.size());
  job->batch->errors.resize(requests.size());
  for (size_t i = 0; i < requests.size(); ++i) job->batch->index.push_back(num_submitted_++);
  job->requests = std::move(requests);
  {
    const std::lock_guard lock(mutex_);
    if (stopping_) return;  // closed from another thread
    jobs_.push_back(std::move(job));
  }
  work_ready_.notify_all();
}

std::unique_ptr<Batch> ClipLoader::next(std::chrono::milliseconds patience) {
  std::unique_lock lock(mutex_);
  const auto ready = [&] { return !jobs_.empty() && jobs_.front()->done == jobs_.front()->requests.size(); };
  batch_ready_.wait_for(lock, patience, [&] { return stopping_ || ready(); });
  if (stopping_ || !ready()) return nullptr;
  std::unique_ptr<Batch> batch = std::move(jobs_.front()->batch);
  jobs_.pop_front();
  return batch;
}

void ClipLoader::close() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  work_ready_.notify_all();
  batch_ready_.notify_all();
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
  const std::lock_guard lock(mutex_);  // another thread may still be in next()
  jobs_.clear();
}

void ClipLoader::work() {
  Converter converter;
  std::unique_lock lock(mutex_);
  for (;;) {
    const auto unfinished = [](const std::unique_ptr<Job>& job) { return job->taken < job->requests.size(); };
    auto job = jobs_.end();
    work_ready_.wait(lock, [&] {
      job = std::find_if(jobs_.begin(), jobs_.end(), unfinished);
      return stopping_ || job != jobs_.end();
    });
    if (stopping_) return;
    Job& current = **job;  // stays while a clip of it is not done
    const size_t clip = current.taken++;
    lock.unlock();
    run(current, clip, converter);
    lock.lock();
    if (++current.done == current.requests.size()) batch_ready_.notify_all();
  }
}

void ClipLoader::run(Job& job, size_t clip, Converter& converter) {
  uint8_t* const out = job.batch->data.get() + options_.clip_bytes() * clip;
  std::string& error = job.batch->errors[clip];
  try {
    const Deadline deadline(options_.timeout_seconds, &stopping_);
    sample_clip(job.requests[clip], options_, deadline, converter, out, nullptr, nullptr);
    return;
  } catch (const Error& fault) {
    error = fault.stage() + ": " + fault.what();
  } catch (const std::exception& fault) {
    error = std::string("decode: ") + fault.what();
  }
  std::memset(out, 0, options_.clip_bytes());
}

}  // namespace pyvdl
