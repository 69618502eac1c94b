// Tests what becomes of a read that fails: test_reading FILE...
//
// The program's own pread() stands before the system's, and fails from a byte on that the tests choose.
// Prints each failed expectation with its line; the exit status is 1 if there is one.
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <limits>
#include <string>
#include <vector>

#include "video_decoder.h"

namespace {

using namespace pyvdl;

constexpr int64_t kNever = std::numeric_limits<int64_t>::max();
int64_t fails_from = kNever;  // a byte of the file
int failures = 0;

void expect(bool holds, const std::string& what, int line) {
  if (holds) return;
  ++failures;
  std::printf("test_reading.cpp:%d: does not hold: %s\n", line, what.c_str());
}

// "stage: message", empty where the call succeeds.
template <typename Call>
std::string error_of(Call call) {
  try {
    call();
    return {};
  } catch (const Error& error) {
    return error.stage() + ": " + error.what();
  }
}

const std::string kWanted = "read: the file: Input/output error";

#define EXPECT(holds, what) expect(holds, what, __LINE__)

// A file that cannot be read to its end must not pass for one that ends there.
void test_opening(const std::string& path, const DecoderOptions& options) {
  const auto bytes = static_cast<int64_t>(std::filesystem::file_size(path));
  const int64_t frames = VideoDecoder({path}, options, Deadline()).index().num_frames();
  int refused = 0;
  for (int tenth = 0; tenth < 10; ++tenth) {
    fails_from = bytes * tenth / 10;
    std::string opened;
    const std::string error = error_of([&] {
      const VideoDecoder decoder({path}, options, Deadline());
      if (decoder.truncated() || decoder.index().num_frames() != frames) opened = ": opened as a shorter one";
    });
    fails_from = kNever;
    refused += !error.empty();
    EXPECT((error.empty() || error.starts_with(kWanted)) && opened.empty(),
           path + " " + std::to_string(tenth) + " " + error + opened);
  }
  EXPECT(refused > 0, path + ": nothing failed");
}

// A frame whose bytes cannot be read has not been damaged; once they can, it is there.
void test_decoding(const std::string& path, const DecoderOptions& options) {
  VideoDecoder decoder({path}, options, Deadline());
  const int64_t last[] = {decoder.index().num_frames() - 1};
  int given = 0;
  const auto decode = [&] { decoder.decode(last, [&](int64_t, const AVFrame&) { ++given; }); };
  fails_from = 0;
  const std::string error = error_of(decode);
  fails_from = kNever;
  EXPECT(error.starts_with(kWanted), path + ": '" + error + "'");
  EXPECT(given == 0, path + ": a frame out of nothing");
  const std::string again = error_of(decode);
  EXPECT(again.empty() && given == 1, path + ": " + again);
}

}  // namespace

extern "C" ssize_t pread(int file, void* target, size_t count, off_t offset) {
  if (offset + static_cast<off_t>(count) <= fails_from) return syscall(SYS_pread64, file, target, count, offset);
  errno = EIO;
  return -1;
}

int main(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    for (const bool whole : {false, true}) {
      for (const bool conceal : {false, true}) {
        DecoderOptions options;
        options.conceal = conceal;
        if (!whole) options.read_whole_bytes = 0;
        test_opening(argv[i], options);
        test_decoding(argv[i], options);
      }
    }
  }
  std::printf("%d failures\n", failures);
  return failures > 0;
}
