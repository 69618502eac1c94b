#include "clip_loader.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <span>
#include <tuple>

namespace pyvdl {
namespace {

constexpr size_t kAlignment = 64;

struct PlannedClip {
  std::vector<int64_t> frames;  // ranks
  ViewPlan view;
  uint8_t* out;
};

PlannedClip plan_clip(const VideoDecoder& decoder, const ClipRequest& request, const ClipOptions& options,
                      uint8_t* out) {
  const PacketIndex& index = decoder.index();
  const Timeline& timeline = index.timeline();
  FramePlan frames = options.frames;
  frames.start_seconds = request.start_seconds;
  frames.end_seconds = request.end_seconds;
  frames.seed = request.seed;
  if (decoder.truncated() && !options.decoder.conceal &&
      request.end_seconds.value_or(timeline.end + 1) > timeline.end) {
    throw Error("read", "the file is cut off: " + std::to_string(index.num_frames()) + " frames of it are there");
  }
  PlannedClip clip{{}, options.view, out};
  clip.view.seed = request.seed;
  try {
    clip.frames = plan_frames(timeline, frames);
  } catch (const SamplingError& error) {
    throw Error("sample", error.what());
  }
  return clip;
}

// Writes all frames of `clips`, each of which is decoded once. Throws the first Error of any of them.
void decode_clips(VideoDecoder& decoder, std::span<const PlannedClip> clips, const ClipOptions& options,
                  Converter& converter) {
  struct Slot {
    int64_t rank;
    size_t clip, frame;
    auto operator<=>(const Slot&) const = default;
  };
  std::vector<Slot> slots;
  for (size_t c = 0; c < clips.size(); ++c) {
    for (size_t f = 0; f < clips[c].frames.size(); ++f) slots.push_back({clips[c].frames[f], c, f});
  }
  std::sort(slots.begin(), slots.end());
  std::vector<int64_t> ranks;
  for (const Slot& slot : slots) {
    if (ranks.empty() || ranks.back() != slot.rank) ranks.push_back(slot.rank);
  }
  const size_t bytes = options.frame_bytes();
  const Orientation orientation = decoder.orientation();
  try {
    decoder.decode(ranks, [&](int64_t rank, const AVFrame& frame) {
      const int width = upright_width(frame.width, frame.height, orientation);
      const int height = upright_height(frame.width, frame.height, orientation);
      const auto begin = std::lower_bound(slots.begin(), slots.end(), Slot{rank, 0, 0});
      for (auto slot = begin; slot != slots.end() && slot->rank == rank; ++slot) {
        const PlannedClip& clip = clips[slot->clip];
        uint8_t* const out = clip.out + bytes * slot->frame;
        if (slot != begin && (slot - 1)->clip == slot->clip) {
          std::memcpy(out, clip.out + bytes * (slot - 1)->frame, bytes);
          continue;
        }
        const View view = plan_view(width, height, clip.view);
        const int64_t pixels = int64_t{view.resized_width} * view.resized_height;
        if (pixels > options.decoder.limits.max_pixels) {
          throw Error("limits", "the resized picture of " + std::to_string(view.resized_width) + "x" +
                                    std::to_string(view.resized_height) +
                                    " exceeds max_pixels = " + std::to_string(options.decoder.limits.max_pixels));
        }
        converter.convert(frame, orientation, view, out);
        decoder.count_converted();
      }
    });
  } catch (const SamplingError& error) {
    throw Error("sample", error.what());
  }
}

}  // namespace

void sample_clip(const ClipRequest& request, const ClipOptions& options, const Deadline& deadline, Converter& converter,
                 uint8_t* out, double* pts_seconds, double* durations_seconds) {
  const auto file = identify(request.source, options.decoder.stream);
  const auto decoder = open_remembered(request.source, file, options.decoder, deadline);
  const PlannedClip clip = plan_clip(*decoder, request, options, out);
  decode_clips(*decoder, {&clip, 1}, options, converter);
  const PacketIndex& index = decoder->index();
  for (size_t i = 0; i < clip.frames.size(); ++i) {
    const auto rank = static_cast<size_t>(clip.frames[i]);
    pts_seconds[i] = index.pts_seconds()[rank];
    durations_seconds[i] = index.durations_seconds()[rank];
  }
}

AlignedBytes allocate_aligned(size_t bytes) {
  const size_t rounded = std::max<size_t>(1, (bytes + kAlignment - 1) / kAlignment) * kAlignment;
  AlignedBytes result(static_cast<uint8_t*>(std::aligned_alloc(kAlignment, rounded)));
  if (!result) throw std::bad_alloc();
  return result;
}

ClipLoader::ClipLoader(const ClipOptions& options, int num_threads)
    : options_(options), num_threads_(static_cast<size_t>(num_threads)) {
  try {
    threads_.reserve(num_threads_);
    while (threads_.size() < num_threads_) threads_.emplace_back([this] { work(); });
  } catch (const std::exception& fault) {
    const std::string which = std::to_string(threads_.size() + 1) + " of " + std::to_string(num_threads_);
    close();
    throw std::runtime_error("thread " + which + " cannot be started: " + fault.what());
  }
}

void ClipLoader::submit(std::vector<ClipRequest> requests) {
  auto job = std::make_unique<Job>();
  job->batch = std::make_unique<Batch>();
  job->batch->data = allocate_aligned(options_.clip_bytes() * requests.size());
  job->batch->errors.resize(requests.size());
  for (size_t i = 0; i < requests.size(); ++i) job->batch->index.push_back(num_submitted_++);
  job->groups = groups_of(requests);
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

std::vector<ClipLoader::Group> ClipLoader::groups_of(const std::vector<ClipRequest>& requests) const {
  using Key = std::tuple<std::string, int64_t, int64_t, const uint8_t*, size_t>;
  std::map<Key, Group> by_source;
  std::vector<Group*> in_order;
  for (size_t i = 0; i < requests.size(); ++i) {
    const Source& source = requests[i].source;
    Group& group = by_source[{source.path, source.offset, source.length, source.memory.data(), source.memory.size()}];
    if (group.empty()) in_order.push_back(&group);
    group.push_back(i);
  }
  // Not so large that some threads would have nothing to do.
  const size_t most = (requests.size() + num_threads_ - 1) / num_threads_;
  std::vector<Group> groups;
  for (Group* group : in_order) {
    std::stable_sort(group->begin(), group->end(),
                     [&](size_t a, size_t b) { return requests[a].start_seconds < requests[b].start_seconds; });
    for (size_t at = 0; at < group->size(); at += most) {
      const auto begin = group->begin() + static_cast<ptrdiff_t>(at);
      groups.emplace_back(begin, begin + static_cast<ptrdiff_t>(std::min(most, group->size() - at)));
    }
  }
  return groups;
}

void ClipLoader::work() {
  Worker worker;
  std::unique_lock lock(mutex_);
  for (;;) {
    const auto unfinished = [](const std::unique_ptr<Job>& job) { return job->taken < job->groups.size(); };
    auto job = jobs_.end();
    work_ready_.wait(lock, [&] {
      job = std::find_if(jobs_.begin(), jobs_.end(), unfinished);
      return stopping_ || job != jobs_.end();
    });
    if (stopping_) return;
    Job& current = **job;  // stays while a clip of it is not done
    const Group& group = current.groups[current.taken++];
    const size_t clips = group.size();
    lock.unlock();
    run(current, group, worker);
    clips_done_ += static_cast<int64_t>(clips);
    lock.lock();
    if ((current.done += clips) == current.requests.size()) batch_ready_.notify_all();
  }
}

void ClipLoader::run(Job& job, const Group& group, Worker& worker) {
  const auto fail = [&](const std::string& text) {
    for (const size_t clip : group) {
      if (job.batch->errors[clip].empty()) job.batch->errors[clip] = text;
    }
  };
  try {
    decode(job, group, worker);
  } catch (const Error& fault) {
    fail(fault.stage() + ": " + fault.what());
  } catch (const std::exception& fault) {
    fail(std::string("decode: ") + fault.what());
  }
  bool good = true;
  for (const size_t clip : group) {
    if (job.batch->errors[clip].empty()) continue;
    good = false;
    std::memset(job.batch->data.get() + options_.clip_bytes() * clip, 0, options_.clip_bytes());
  }
  if (good && worker.file) return;
  worker.decoder.reset();
  worker.file.reset();
}

void ClipLoader::decode(Job& job, const Group& group, Worker& worker) {
  const auto limit = [&](size_t clips) {
    auto seconds = options_.timeout_seconds;
    if (seconds) *seconds *= static_cast<double>(clips);
    return Deadline(seconds, &stopping_);
  };
  const Source& source = job.requests[group[0]].source;
  const auto file = identify(source, options_.decoder.stream);
  if (!worker.decoder || !file || file != worker.file) {
    worker.decoder.reset();  // before another one takes memory
    worker.file.reset();
    worker.decoder = open_remembered(source, file, options_.decoder, limit(group.size()));
    worker.file = file;
  } else {
    worker.decoder->set_deadline(limit(group.size()));
  }

  std::vector<PlannedClip> clips;
  std::vector<size_t> numbers;
  const auto attempt = [&](size_t number, auto call) {
    try {
      call();
    } catch (const Error& fault) {
      job.batch->errors[number] = fault.stage() + ": " + fault.what();
    } catch (const std::exception& fault) {  // no memory, for one: the other clips keep what they have
      job.batch->errors[number] = std::string("decode: ") + fault.what();
    }
  };
  for (const size_t number : group) {
    attempt(number, [&] {
      uint8_t* const out = job.batch->data.get() + options_.clip_bytes() * number;
      clips.push_back(plan_clip(*worker.decoder, job.requests[number], options_, out));
      numbers.push_back(number);
    });
  }
  // What is approximate or concealed may depend on what else is decoded, and a clip must not depend on its neighbours.
  const bool exact = !options_.decoder.fast && !options_.decoder.conceal;
  if (exact && clips.size() > 1) {
    try {
      decode_clips(*worker.decoder, clips, options_, worker.converter);
      return;
    } catch (const std::exception&) {  // each by itself, to find out whose it is
    }
  }
  for (size_t i = 0; i < clips.size(); ++i) {
    attempt(numbers[i], [&] {
      if (group.size() > 1) worker.decoder->set_deadline(limit(1));
      if (!exact) worker.decoder->restart();
      decode_clips(*worker.decoder, {&clips[i], 1}, options_, worker.converter);
    });
  }
}

}  // namespace pyvdl
