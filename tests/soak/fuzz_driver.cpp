// Takes libFuzzer's place where the compiler has none: runs random mutations of the seeds through
// LLVMFuzzerTestOneInput, without looking at coverage. Understands as much of libFuzzer's command line as the soak
// uses:
//   fuzz -max_total_time=SECONDS -seed=N -timeout=SECONDS -artifact_prefix=PREFIX FOLDER
//   fuzz FILE...                                     runs these inputs only
// The input being run stands in PREFIX + "current" until it is done, so that it outlives any kind of death.
#include <fcntl.h>
#include <signal.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>

#include "mutate.h"

extern "C" {
int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);
// There under a sanitizer only.
[[gnu::weak]] void __sanitizer_print_stack_trace();
[[gnu::weak]] void __sanitizer_set_death_callback(void (*callback)());
}

namespace {

using namespace pyvdl;

constexpr size_t kChoiceBytes = 16;  // as in fuzz_target.cpp
constexpr size_t kMaxBytes = 1 << 20;

unsigned timeout_seconds = 10;
int64_t executions = 0;

void on_alarm(int) {
  static const char text[] = "ERROR: timeout\n";
  if (::write(STDERR_FILENO, text, sizeof(text) - 1) < 0) _exit(71);
  if (__sanitizer_print_stack_trace) __sanitizer_print_stack_trace();
  _exit(70);
}

void run(const FileBytes& input) {
  const std::unique_ptr<uint8_t[]> exact(new uint8_t[input.size()]);  // a read past the end is seen
  std::memcpy(exact.get(), input.data(), input.size());
  ::alarm(timeout_seconds);
  LLVMFuzzerTestOneInput(exact.get(), input.size());
  ::alarm(0);
  ++executions;
}

void print_count() { std::fprintf(stderr, "stat::number_of_executed_units: %ld\n", static_cast<long>(executions)); }

void fuzz(const std::filesystem::path& folder, double seconds, uint64_t seed, const std::string& prefix) {
  std::vector<FileBytes> seeds;
  for (const auto& file : files_of(folder)) seeds.push_back(read_file(file));
  const std::string current = prefix + "current";
  const int record = ::open(current.c_str(), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (record < 0) throw std::runtime_error("cannot write " + current);
  if (__sanitizer_set_death_callback) __sanitizer_set_death_callback(print_count);
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  Random random(seed, 0);
  const auto any = [&]() -> const FileBytes& {
    return seeds[static_cast<size_t>(random.below(static_cast<int64_t>(seeds.size())))];
  };
  while (std::chrono::steady_clock::now() < end) {
    FileBytes input = any();
    if (random.below(2)) {  // other choices
      for (size_t i = 0; i < kChoiceBytes; ++i) input[i] = static_cast<uint8_t>(random.next());
    }
    for (int64_t changes = 1 + random.below(1 << random.below(4)); changes > 0; --changes) {
      mutate(input, kChoiceBytes, any(), random);
    }
    if (input.size() > kMaxBytes) input.resize(kMaxBytes);
    if (::pwrite(record, input.data(), input.size(), 0) < 0 ||
        ::ftruncate(record, static_cast<off_t>(input.size())) != 0) {
      throw std::runtime_error("cannot write " + current);
    }
    run(input);
  }
  ::close(record);
  std::filesystem::remove(current);
}

}  // namespace

int main(int argc, char** argv) {
  std::map<std::string, std::string> flags{{"-max_total_time", "60"}, {"-seed", "1"}, {"-timeout", "10"}};
  std::vector<std::filesystem::path> inputs;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument.starts_with('-')) {
      const size_t equals = argument.find('=');
      flags[argument.substr(0, equals)] = argument.substr(std::min(argument.size(), equals + 1));
    } else {
      inputs.emplace_back(argument);
    }
  }
  timeout_seconds = static_cast<unsigned>(std::stoul(flags["-timeout"]));
  ::signal(SIGALRM, on_alarm);
  for (const auto& input : inputs) {
    if (std::filesystem::is_directory(input)) {
      fuzz(input, std::stod(flags["-max_total_time"]), std::stoull(flags["-seed"]), flags["-artifact_prefix"]);
    } else {
      run(read_file(input));
    }
  }
  print_count();
  return 0;
}
