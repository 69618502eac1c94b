// What is fuzzed: the bytes of a video file go through demuxer, index, decoder and converter, and the result is held
// against what the headers promise. The first kChoiceBytes bytes of an input choose what is asked of the file.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <string_view>
#include <vector>

#include "clip_loader.h"

namespace {

using namespace pyvdl;

constexpr size_t kChoiceBytes = 16;
constexpr double kTimeoutSeconds = 3;

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "ERROR: broken promise: %s\n", what);
  std::abort();
}

// Small, so that a file cannot ask for much memory or time.
constexpr Limits kLimits{.max_pixels = 1 << 18, .max_frames = 1000, .max_seconds = 3600, .max_bytes = 1 << 26};

ClipOptions options_of(const uint8_t* choice) {
  ClipOptions options;
  options.timeout_seconds = kTimeoutSeconds;
  options.decoder.limits = kLimits;
  options.decoder.fast = choice[0] & 1;
  options.decoder.conceal = choice[0] & 2;
  if (choice[14] & 1) options.decoder.read_whole_bytes = 0;
  if (choice[0] & 4) options.decoder.stream = choice[0] >> 4 & 1;
  options.frames.sampling = static_cast<Sampling>(choice[1] & 3);
  options.frames.short_clip = static_cast<ShortClip>((choice[1] >> 2 & 3) % 3);
  options.frames.num_frames = 1 + (choice[1] >> 4);
  options.frames.fps = 0.25 * (1 + choice[2]);
  options.view.crop = static_cast<Crop>(choice[3] % 3);
  options.view.flip = choice[3] & 64;
  if (choice[3] & 128) options.view.scale_jitter = {0.5, 1.5};
  options.view.short_side = 1 + choice[4] % 128;
  options.view.size = 1 + choice[5] % 96;
  for (size_t i = 0; i < 2; ++i) {
    options.view.rectangle[i] = choice[6 + i] % 64;
    options.view.rectangle[2 + i] = 1 + choice[8 + i] % 64;
  }
  return options;
}

// A value that no picture has by chance: tells bytes that were never written.
uint8_t untouched(size_t at) { return static_cast<uint8_t>((at * 0x9E3779B97F4A7C15ULL) >> 56); }

void sample(std::span<const uint8_t> file, const ClipOptions& options, const uint8_t* choice) {
  ClipRequest request;
  request.source.memory = file;
  request.start_seconds = choice[10] / 16.0;
  if (choice[11]) request.end_seconds = request.start_seconds + choice[11] / 16.0;
  request.seed = choice[12];
  const size_t bytes = options.clip_bytes();
  const std::unique_ptr<uint8_t[]> out(new uint8_t[bytes]);  // exactly as long as promised
  for (size_t i = 0; i < bytes; ++i) out[i] = untouched(i);
  std::vector<double> pts(static_cast<size_t>(options.frames.num_frames));
  std::vector<double> durations(pts.size());
  Converter converter;
  sample_clip(request, options, Deadline(options.timeout_seconds), converter, out.get(), pts.data(), durations.data());

  const size_t row = 3 * static_cast<size_t>(options.view.out_width());
  for (size_t at = 0; row >= 24 && at < bytes; at += row) {
    size_t same = 0;
    while (same < row && out[at + same] == untouched(at + same)) ++same;
    require(same < row, "a clip without an error is written whole");
  }
}

// Frames by their number in any order, upright by an orientation of our own choice.
void read_frames(std::span<const uint8_t> file, const ClipOptions& options, const uint8_t* choice) {
  Source source;
  source.memory = file;
  VideoDecoder decoder(source, options.decoder, Deadline(options.timeout_seconds));
  const PacketIndex& index = decoder.index();
  const int64_t count = index.num_frames();
  require(count > 0, "an opened video has a frame");
  const Timeline timeline = index.timeline();
  require(timeline.starts.front() == 0, "the first frame starts at 0");
  require(std::is_sorted(timeline.starts.begin(), timeline.starts.end()), "frames start in order");
  require(timeline.end >= timeline.starts.back(), "the end follows the last start");
  require(std::is_sorted(timeline.key_frames.begin(), timeline.key_frames.end()), "key frames are in order");
  for (int64_t rank = 0; rank < count; ++rank) {
    require(index.rank(index.ordinal(rank)) == rank, "rank and ordinal are inverse");
    require(index.durations_seconds()[static_cast<size_t>(rank)] > 0, "a frame lasts");
  }
  require(decoder.metadata().num_frames == count, "metadata counts the frames of the index");

  const Orientation orientation{choice[6] % 4 * 90, (choice[6] & 4) != 0};
  Converter converter;
  const auto read = [&](std::vector<int64_t> ranks) {
    std::sort(ranks.begin(), ranks.end());
    ranks.erase(std::unique(ranks.begin(), ranks.end()), ranks.end());
    std::vector<bool> given(static_cast<size_t>(count));
    try {
      decoder.decode(ranks, [&](int64_t rank, const AVFrame& frame) {
        require(std::binary_search(ranks.begin(), ranks.end(), rank), "only wanted frames are given");
        given[static_cast<size_t>(rank)] = true;
        const int width = upright_width(frame.width, frame.height, orientation);
        const int height = upright_height(frame.width, frame.height, orientation);
        // Every other file unscaled, as when all frames of a video are read.
        const View view = choice[6] & 8 ? plan_view(width, height, options.view)
                                        : View{width, height, 0, 0, width, height, (choice[6] & 16) != 0};
        const size_t bytes = 3 * static_cast<size_t>(view.width) * static_cast<size_t>(view.height);
        const std::unique_ptr<uint8_t[]> out(new uint8_t[bytes]);
        converter.convert(frame, orientation, view, out.get());
      });
    } catch (const Error& error) {
      if (error.stage() == "timeout" || error.stage() == "limits") throw;
      return;  // the decoder stays usable
    } catch (const SamplingError&) {
      return;
    }
    for (const int64_t rank : ranks) require(given[static_cast<size_t>(rank)], "every wanted frame is given");
  };
  const int64_t at = choice[7] % count;
  read({at});
  read({std::min(count - 1, at + 1)});  // goes on
  read({choice[8] % count, choice[9] % count, choice[10] % count, at});
  read({0});
  if (choice[0] & 8) {
    for (int64_t rank = 0; rank < std::min<int64_t>(count, 16); ++rank) read({rank});
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < kChoiceBytes) return 0;
  const std::span<const uint8_t> file(data + kChoiceBytes, size - kChoiceBytes);
  const ClipOptions options = options_of(data);
  try {
    if (data[13] & 1) {
      read_frames(file, options, data);
    } else {
      sample(file, options, data);
    }
  } catch (const Error& error) {
    const std::initializer_list<std::string_view> stages{"open",   "header",  "stream", "codec",  "read",
                                                         "decode", "convert", "sample", "limits", "timeout"};
    require(std::find(stages.begin(), stages.end(), error.stage()) != stages.end(), "an error names a known stage");
  }  // any other exception is a finding
  return 0;
}
