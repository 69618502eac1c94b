// Opens and closes every file, as it is and with a random mutation, and tells what that leaves in memory. The second
// half of the rounds repeats the first, so whatever is cached is there by then and nothing at all may be added.
//   open_close ROUNDS PREFIX FILE...     an input that leaves bytes behind is written to PREFIX + number
#include <sys/resource.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>

#include "mutate.h"
#include "video_decoder.h"

extern "C" size_t __sanitizer_get_current_allocated_bytes();  // GCC has the function but not the header

namespace {

using namespace pyvdl;

constexpr int kMaxReports = 5;
constexpr double kTimeoutSeconds = 10;
constexpr Limits kLimits{.max_pixels = 1 << 22, .max_frames = 10000, .max_seconds = 3600, .max_bytes = 1 << 26};

bool opens(const FileBytes& bytes) {
  Source source;
  source.memory = bytes;
  DecoderOptions options;
  options.limits = kLimits;
  bool opened = false;
  try {
    VideoDecoder decoder(source, options, Deadline(kTimeoutSeconds));
    opened = true;
  } catch (const Error&) {
  }
  take_log();  // kept for the thread until its next error
  return opened;
}

int64_t resident_bytes() {
  std::ifstream statm("/proc/self/statm");
  int64_t all = 0, resident = 0;
  statm >> all >> resident;
  return resident * ::sysconf(_SC_PAGESIZE);
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = std::stoi(argv[1]);
  const std::string prefix = argv[2];
  std::vector<FileBytes> files;
  for (int i = 3; i < argc; ++i) files.push_back(read_file(argv[i]));

  int64_t opened = 0, refused = 0, resident = 0, grown = 0;
  int reports = 0;
  for (int half = 0; half < 2; ++half) {
    if (half == 1) resident = resident_bytes();
    for (size_t f = 0; f < files.size(); ++f) {
      for (int i = 0; i < rounds / 2; ++i) {
        Random random(static_cast<uint64_t>(i) * files.size() + f, 0);
        FileBytes mutated = files[f];
        mutate(mutated, 0, files[(f + 1) % files.size()], random);
        for (const FileBytes* bytes : {&files[f], &mutated}) {
          const size_t before = __sanitizer_get_current_allocated_bytes();
          (opens(*bytes) ? opened : refused) += 1;
          const auto left = static_cast<int64_t>(__sanitizer_get_current_allocated_bytes() - before);
          if (half == 0 || left == 0) continue;
          grown += left;
          if (++reports > kMaxReports) continue;
          const std::string name = prefix + std::to_string(reports);
          std::ofstream(name, std::ios::binary)
              .write(reinterpret_cast<const char*>(bytes->data()), static_cast<std::streamsize>(bytes->size()));
          std::fprintf(stderr, "ERROR: %ld bytes left by %s\n", static_cast<long>(left), name.c_str());
        }
      }
    }
  }
  std::printf("%zu files, %ld opened, %ld refused, %ld live bytes added, resident memory grew by %ld KiB\n",
              files.size(), static_cast<long>(opened), static_cast<long>(refused), static_cast<long>(grown),
              static_cast<long>((resident_bytes() - resident) / 1024));
  return grown != 0;
}
