#include "index_cache.h"

#include <sys/stat.h>

namespace pyvdl {
namespace {

constexpr int64_t kMaxPackets = 1 << 14;  // about 5 MB

}  // namespace

std::optional<FileIdentity> identify(const Source& source, std::optional<int> stream) {
  struct stat status{};
  if (source.path.empty() || ::stat(source.path.c_str(), &status) != 0 || !S_ISREG(status.st_mode)) return std::nullopt;
#ifdef __APPLE__
  const timespec& modified = status.st_mtimespec;
#else
  const timespec& modified = status.st_mtim;
#endif
  return FileIdentity{.path = source.path,
                      .offset = source.offset,
                      .length = source.length,
                      .stream = stream.value_or(-1),
                      .device = static_cast<uint64_t>(status.st_dev),
                      .inode = static_cast<uint64_t>(status.st_ino),
                      .size = static_cast<int64_t>(status.st_size),
                      .modified_seconds = static_cast<int64_t>(modified.tv_sec),
                      .modified_nanoseconds = static_cast<int64_t>(modified.tv_nsec)};
}

std::shared_ptr<const StreamIndex> IndexCache::find(const FileIdentity& file) {
  const std::lock_guard lock(mutex_);
  const auto found = by_file_.find(file);
  if (found == by_file_.end()) return nullptr;
  entries_.splice(entries_.begin(), entries_, found->second);
  return found->second->second;
}

void IndexCache::keep(const FileIdentity& file, std::shared_ptr<const StreamIndex> index) {
  const std::lock_guard lock(mutex_);
  if (by_file_.contains(file)) return;  // another thread was first
  num_packets_ += index->packets.num_packets();
  entries_.emplace_front(file, std::move(index));
  by_file_[file] = entries_.begin();
  while (num_packets_ > max_packets_ && entries_.size() > 1) {
    num_packets_ -= entries_.back().second->packets.num_packets();
    by_file_.erase(entries_.back().first);
    entries_.pop_back();
  }
}

std::unique_ptr<VideoDecoder> open_remembered(const Source& source, const std::optional<FileIdentity>& file,
                                              const DecoderOptions& options, const Deadline& deadline) {
  static IndexCache cache(kMaxPackets);
  const std::shared_ptr<const StreamIndex> known = file ? cache.find(*file) : nullptr;
  auto decoder = std::make_unique<VideoDecoder>(source, options, deadline, known);
  if (file && !known) cache.keep(*file, decoder->shared_index());
  return decoder;
}

}  // namespace pyvdl
