// Remembers what opening a file found out, so that its next clip opens without reading all packets again.
#pragma once

#include <compare>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>

#include "video_decoder.h"

namespace pyvdl {

// A video stream of a file that has not changed since. Times are as the file system gives them.
struct FileIdentity {
  std::string path;
  int64_t offset = 0, length = 0;
  int stream = -1;
  uint64_t device = 0, inode = 0;
  int64_t size = 0, modified_seconds = 0, modified_nanoseconds = 0;

  auto operator<=>(const FileIdentity&) const = default;
};
// Nothing for memory, pipes, and files that cannot be looked at.
std::optional<FileIdentity> identify(const Source& source, std::optional<int> stream);

// Thread-safe. Keeps the last used, up to a number of packets in all, and always the very last.
class IndexCache {
 public:
  explicit IndexCache(int64_t max_packets) : max_packets_(max_packets) {}
  std::shared_ptr<const StreamIndex> find(const FileIdentity& file);
  void keep(const FileIdentity& file, std::shared_ptr<const StreamIndex> index);

 private:
  using Entries = std::list<std::pair<FileIdentity, std::shared_ptr<const StreamIndex>>>;  // the last used first

  const int64_t max_packets_;
  std::mutex mutex_;
  Entries entries_;
  std::map<FileIdentity, Entries::iterator> by_file_;
  int64_t num_packets_ = 0;
};

// Opens a decoder with what is known of the file from earlier in this process.
std::unique_ptr<VideoDecoder> open_remembered(const Source& source, const std::optional<FileIdentity>& file,
                                              const DecoderOptions& options, const Deadline& deadline);

}  // namespace pyvdl
