// For the thread sanitizer: a ClipLoader of four threads whose consumers stay, leave early, are cut off by a close()
// from another thread, or ask for clips that fail or come too late. Every good clip must have the bytes that it has
// when one thread decodes it alone.   loader_threads SECONDS FOLDER
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <thread>

#include "clip_loader.h"
#include "mutate.h"

namespace {

using namespace pyvdl;

constexpr int kThreads = 4;
constexpr size_t kBatches = 6, kBatchClips = 5;
constexpr std::chrono::milliseconds kPatience{20};

int64_t failures = 0;

void expect(bool holds, const char* what) {
  if (holds) return;
  ++failures;
  std::fprintf(stderr, "ERROR: broken promise: %s\n", what);
}

ClipOptions options_of(std::optional<double> timeout_seconds) {
  ClipOptions options;
  options.frames.num_frames = 2;
  options.frames.sampling = Sampling::random;
  options.view.crop = Crop::random;
  options.view.short_side = 40;
  options.view.size = 32;
  options.timeout_seconds = timeout_seconds;
  return options;
}

struct Clip {
  ClipRequest request;
  FileBytes expected;  // empty: it fails
};

Clip decoded_alone(const ClipRequest& request) {
  const ClipOptions options = options_of({});
  Clip clip{request, FileBytes(options.clip_bytes())};
  try {
    Converter converter;
    std::vector<double> times(2 * static_cast<size_t>(options.frames.num_frames));
    double* const durations = times.data() + options.frames.num_frames;
    sample_clip(request, options, Deadline(), converter, clip.expected.data(), times.data(), durations);
  } catch (const Error&) {
    clip.expected.clear();
  }
  return clip;
}

struct Taken {
  int64_t good = 0, failed = 0;
};

// `in_time`: no time limit can have stopped a clip.
void check(const Batch& batch, const std::vector<const Clip*>& clips, bool in_time, Taken& taken) {
  const size_t bytes = options_of({}).clip_bytes();
  for (size_t i = 0; i < batch.index.size(); ++i) {
    const Clip& clip = *clips[static_cast<size_t>(batch.index[i])];
    if (!batch.errors[i].empty()) {
      ++taken.failed;
      expect(clip.expected.empty() || !in_time, "a clip that decodes alone decodes in a batch");
      continue;
    }
    ++taken.good;
    const uint8_t* const data = batch.data.get() + bytes * i;
    expect(std::equal(clip.expected.begin(), clip.expected.end(), data, data + bytes),
           "a clip has the same bytes in every batch");
  }
}

}  // namespace

int main(int, char** argv) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(std::stod(argv[1]));
  std::vector<FileBytes> files;
  std::vector<Clip> clips;
  for (const auto& path : files_of(argv[2])) {
    files.push_back(read_file(path));
    clips.push_back(decoded_alone({{.path = path.string()}, 0, {}, clips.size()}));
  }
  Random random(1, 0);
  for (size_t i = 0, count = files.size(); i < count; ++i) {
    clips.push_back(decoded_alone({{.memory = files[i]}, 0.1, {}, i}));
    FileBytes damaged = files[i];
    mutate(damaged, 0, files[(i + 1) % count], random);
    files.push_back(std::move(damaged));  // moves the vectors, not the bytes that requests point to
    clips.push_back(decoded_alone({{.memory = files.back()}, 0, {}, i}));
  }
  clips.push_back(decoded_alone({{.path = "/nonexistent/file.mp4"}}));
  clips.push_back(decoded_alone({{.path = "/"}}));
  clips.push_back(decoded_alone({{.memory = files[0]}, 1e6}));
  if (std::none_of(clips.begin(), clips.end(), [](const Clip& clip) { return !clip.expected.empty(); })) {
    std::fprintf(stderr, "ERROR: no clip can be decoded\n");
    return 1;
  }

  Taken taken;
  int64_t rounds = 0;
  for (; std::chrono::steady_clock::now() < end; ++rounds) {
    const bool leaves_early = rounds % 4 == 1, closed_elsewhere = rounds % 4 == 2, hurried = rounds % 4 == 3;
    ClipLoader loader(options_of(hurried ? std::optional(0.002 * static_cast<double>(random.below(10))) : std::nullopt),
                      kThreads);
    std::vector<const Clip*> asked;
    std::thread closer;
    if (closed_elsewhere) {
      closer = std::thread([&loader, delay = std::chrono::milliseconds(random.below(60))] {
        std::this_thread::sleep_for(delay);
        loader.close();
      });
    }
    for (size_t b = 0; b < kBatches; ++b) {
      std::vector<ClipRequest> requests;
      for (size_t i = 0; i < kBatchClips; ++i) {
        asked.push_back(&clips[static_cast<size_t>(random.below(static_cast<int64_t>(clips.size())))]);
        requests.push_back(asked.back()->request);
      }
      loader.submit(std::move(requests));
    }
    const size_t wanted = leaves_early ? static_cast<size_t>(random.below(kBatches)) : kBatches;
    for (size_t got = 0; got < wanted;) {
      const std::unique_ptr<Batch> batch = loader.next(kPatience);
      if (batch) {
        expect(batch->index.front() == static_cast<int64_t>(got * kBatchClips), "batches come in order");
        check(*batch, asked, !hurried, taken);
        ++got;
      } else if (closed_elsewhere) {
        closer.join();  // no batch is left, or it was only late: no matter
        break;
      }
    }
    if (closer.joinable()) closer.join();
  }
  std::printf("%ld loaders of %d threads, %ld good clips, %ld failed clips, %ld broken promises\n",
              static_cast<long>(rounds), kThreads, static_cast<long>(taken.good), static_cast<long>(taken.failed),
              static_cast<long>(failures));
  return failures > 0;
}
