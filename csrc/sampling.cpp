#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

namespace pyvdl {
namespace {

constexpr uint64_t kTimeStream = 1, kViewStream = 2;
constexpr double kMaxSide = 1 << 16;  // pixels of a resized picture

std::string number(double value) {
  char text[32];
  std::snprintf(text, sizeof(text), "%g", value);
  return text;
}

}  // namespace

uint64_t Random::next() {
  uint64_t z = state_ += 0x9E3779B97F4A7C15ULL;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ULL;
  z = (z ^ z >> 27) * 0x94D049BB133111EBULL;
  return z ^ z >> 31;
}

double Random::uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }

int64_t Random::below(int64_t bound) {
  return std::min<int64_t>(bound - 1, static_cast<int64_t>(uniform() * static_cast<double>(bound)));
}

int64_t Timeline::at(double seconds) const {
  const auto after = std::upper_bound(starts.begin(), starts.end(), seconds);
  return std::max<int64_t>(0, after - starts.begin() - 1);
}

std::vector<int64_t> plan_frames(const Timeline& timeline, const FramePlan& plan) {
  if (timeline.starts.empty()) throw SamplingError("no frame is shown");
  const double start = plan.start_seconds;
  const double end = std::min(plan.end_seconds.value_or(timeline.end), timeline.end);
  if (start >= end) {
    throw SamplingError("window [" + number(start) + ", " + number(plan.end_seconds.value_or(timeline.end)) +
                        ") s lies outside the video's [0, " + number(timeline.end) + ") s");
  }
  const auto wanted = static_cast<size_t>(plan.num_frames);
  std::vector<int64_t> frames;
  frames.reserve(wanted);

  if (plan.sampling == Sampling::fps) {
    for (size_t i = 0; i < wanted; ++i) {
      const double instant = start + static_cast<double>(i) / plan.fps;
      if (instant >= end) break;
      frames.push_back(timeline.at(instant));
    }
    const size_t found = frames.size();
    if (found < wanted && plan.short_clip == ShortClip::error) {
      throw SamplingError("the window has " + std::to_string(found) + " instants at " + number(plan.fps) +
                          " frames a second, " + std::to_string(wanted) + " wanted");
    }
    for (size_t i = found; i < wanted; ++i) {
      frames.push_back(plan.short_clip == ShortClip::loop ? frames[i % found] : frames[found - 1]);
    }
    return frames;
  }

  if (plan.short_clip == ShortClip::error && plan.sampling != Sampling::keyframe) {
    const auto first = timeline.at(start);
    const auto past = std::lower_bound(timeline.starts.begin(), timeline.starts.end(), end) - timeline.starts.begin();
    if (past - first < plan.num_frames) {
      throw SamplingError("the window shows " + std::to_string(past - first) + " frames, " + std::to_string(wanted) +
                          " wanted");
    }
  }
  Random random(plan.seed, kTimeStream);
  for (size_t i = 0; i < wanted; ++i) {
    const double within = plan.sampling == Sampling::random ? random.uniform() : 0.5;
    const double instant = start + (static_cast<double>(i) + within) * (end - start) / static_cast<double>(wanted);
    int64_t frame = timeline.at(instant);
    if (plan.sampling == Sampling::keyframe) {
      const auto after = std::upper_bound(timeline.key_frames.begin(), timeline.key_frames.end(), frame);
      if (after == timeline.key_frames.begin()) {
        throw SamplingError("no key frame at or before " + number(instant) + " s");
      }
      frame = *(after - 1);
    }
    frames.push_back(frame);
  }
  return frames;
}

View plan_view(int width, int height, const ViewPlan& plan) {
  View view;
  const int shorter = std::min(width, height);
  const auto scaled = [&](int side, double factor) {
    const double wanted = static_cast<double>(side) * plan.short_side / shorter * factor;
    if (wanted > kMaxSide) {
      throw SamplingError("the picture of " + std::to_string(width) + "x" + std::to_string(height) +
                          " would be resized to a side of " + number(wanted) + " pixels, more than " +
                          number(kMaxSide));
    }
    return std::max(1, static_cast<int>(std::lround(wanted)));
  };
  Random random(plan.seed, kViewStream);
  double height_factor = 1, width_factor = 1;
  if (plan.scale_jitter) {
    const auto [low, high] = *plan.scale_jitter;
    height_factor = low + (high - low) * random.uniform();
    width_factor = low + (high - low) * random.uniform();
  }
  view.resized_height = scaled(height, height_factor);
  view.resized_width = scaled(width, width_factor);
  view.height = plan.out_height();
  view.width = plan.out_width();
  if (plan.crop == Crop::fixed) {
    view.y = plan.rectangle[0];
    view.x = plan.rectangle[1];
    if (view.y + view.height > view.resized_height || view.x + view.width > view.resized_width) {
      throw SamplingError("crop (" + std::to_string(view.y) + ", " + std::to_string(view.x) + ", " +
                          std::to_string(view.height) + ", " + std::to_string(view.width) +
                          ") does not fit into the resized picture of height " + std::to_string(view.resized_height) +
                          " and width " + std::to_string(view.resized_width));
    }
  } else {
    view.resized_height = std::max(view.resized_height, plan.size);
    view.resized_width = std::max(view.resized_width, plan.size);
    const int free_y = view.resized_height - plan.size, free_x = view.resized_width - plan.size;
    const bool anywhere = plan.crop == Crop::random;
    view.y = anywhere ? static_cast<int>(random.below(free_y + 1)) : free_y / 2;
    view.x = anywhere ? static_cast<int>(random.below(free_x + 1)) : free_x / 2;
  }
  view.mirrored = plan.flip && random.uniform() < 0.5;
  return view;
}

}  // namespace pyvdl
