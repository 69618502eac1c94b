// Which frames a clip takes and which part of them it keeps. Pure functions of times and sizes; no FFmpeg.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

namespace pyvdl {

// A request that the given video cannot meet.
class SamplingError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// SplitMix64: the same numbers on every platform, unlike the distributions of <random>. `stream` separates uses of a
// seed.
class Random {
 public:
  Random(uint64_t seed, uint64_t stream) : state_(seed ^ (stream * 0xD1B54A32D192ED03ULL)) { next(); }
  uint64_t next();
  double uniform();              // [0, 1)
  int64_t below(int64_t bound);  // [0, bound)

 private:
  uint64_t state_;
};

// When the frames of a video are shown, in seconds from the first shown frame.
struct Timeline {
  std::vector<double> starts;       // ascending, starts[0] == 0
  double end = 0;                   // of the last frame
  std::vector<int64_t> key_frames;  // ascending

  // The frame played at `seconds` in [0, end): the last one that starts at or before it.
  int64_t at(double seconds) const;
};

enum class Sampling { uniform, fps, random, keyframe };
enum class ShortClip { repeat_last, loop, error };

struct FramePlan {
  double start_seconds = 0;
  std::optional<double> end_seconds;  // nothing: the end of the last frame
  int num_frames = 8;
  Sampling sampling = Sampling::uniform;
  double fps = 2.0;
  ShortClip short_clip = ShortClip::repeat_last;
  uint64_t seed = 0;
};

// The `num_frames` frames of the clip. The window is cut at the video's end.
//   uniform   centres of num_frames equal segments of the window
//   random    one uniform instant in each of these segments
//   keyframe  the key frame at or before each uniform instant; repeats are allowed
//   fps       every 1/fps seconds from the start; `short_clip` says what follows when the window ends too early
// With ShortClip::error, uniform and random also refuse a window that shows fewer frames than asked.
std::vector<int64_t> plan_frames(const Timeline& timeline, const FramePlan& plan);

enum class Crop { center, random, fixed };

struct ViewPlan {
  int short_side = 256;
  int size = 224;
  Crop crop = Crop::center;
  std::array<int, 4> rectangle{};  // y, x, h, w of Crop::fixed, in pixels of the resized picture
  std::optional<std::array<double, 2>> scale_jitter;
  bool flip = false;  // mirrored with probability 1/2
  uint64_t seed = 0;

  int out_height() const { return crop == Crop::fixed ? rectangle[2] : size; }
  int out_width() const { return crop == Crop::fixed ? rectangle[3] : size; }
};

// How a picture becomes an output: resized to resized_width x resized_height, cut to the rectangle, mirrored.
struct View {
  int resized_width = 0;
  int resized_height = 0;
  int x = 0;
  int y = 0;
  int width = 0;
  int height = 0;
  bool mirrored = false;

  bool operator==(const View&) const = default;
};

// The same view for all frames of a clip whose upright pictures are width x height. Jitter scales height and width by
// independent factors; a side that would come out smaller than the crop is enlarged to it.
View plan_view(int width, int height, const ViewPlan& plan);

}  // namespace pyvdl
