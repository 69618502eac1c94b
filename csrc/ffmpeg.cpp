#include "ffmpeg.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <mutex>
#include <utility>

namespace pyvdl {
namespace {

constexpr int kIoBufferBytes = 64 * 1024;
constexpr size_t kLogBytes = 300;  // the first messages tell the cause; the rest repeats it

thread_local std::string error_log;

// Keeps FFmpeg off stderr and its error messages for our own error texts.
void record_log(void* context, int level, const char* format, va_list arguments) {
  if (level > AV_LOG_ERROR || error_log.size() >= kLogBytes) return;
  char line[256];
  int prefix = 0;
  av_log_format_line2(context, level, format, arguments, line, sizeof(line), &prefix);
  std::string_view text(line);
  if (const size_t end = text.find("] "); text.starts_with('[') && end != std::string_view::npos) {
    text.remove_prefix(end + 2);  // "[h264 @ 0x55..] "
  }
  while (!text.empty() && text.back() == '\n') text.remove_suffix(1);
  if (text.empty() || error_log.find(text) != std::string::npos) return;
  if (!error_log.empty()) error_log += "; ";
  error_log += text;
}

void install_log_once() {
  static std::once_flag once;
  std::call_once(once, [] { av_log_set_callback(record_log); });
}

std::string format_number(double value) {
  char text[32];
  std::snprintf(text, sizeof(text), "%g", value);
  return text;
}

std::string system_error(int number) { return std::generic_category().message(number); }

int refuse_open(AVFormatContext*, AVIOContext**, const char*, int, AVDictionary**) { return AVERROR(EACCES); }

}  // namespace

int check(int code, std::string_view stage, std::string_view what) {
  if (code >= 0) return code;
  if (code == AVERROR_EXIT) throw Error("timeout", "time limit reached");
  char text[AV_ERROR_MAX_STRING_SIZE] = {};
  av_strerror(code, text, sizeof(text));
  std::string message = std::string(what) + ": " + text;
  if (const std::string log = take_log(); !log.empty()) message += " (" + log + ")";
  throw Error(std::string(stage), message);
}

bool has_log() { return !error_log.empty(); }

std::string take_log() { return std::exchange(error_log, {}); }

void IoCloser::operator()(AVIOContext* p) const {
  if (p) av_freep(&p->buffer);
  avio_context_free(&p);
}

PacketPtr make_packet() {
  PacketPtr packet(av_packet_alloc());
  if (!packet) throw std::bad_alloc();
  return packet;
}

FramePtr make_frame() {
  FramePtr frame(av_frame_alloc());
  if (!frame) throw std::bad_alloc();
  return frame;
}

Deadline::Deadline(std::optional<double> timeout_seconds, const std::atomic<bool>* cancelled) : cancelled_(cancelled) {
  constexpr double kNever = 1e8;  // three years, which a clock's nanoseconds still hold
  if (!timeout_seconds || *timeout_seconds >= kNever) return;
  timeout_seconds_ = *timeout_seconds;
  at_ = std::chrono::steady_clock::now() + std::chrono::duration_cast<std::chrono::steady_clock::duration>(
                                               std::chrono::duration<double>(timeout_seconds_));
}

void Deadline::require() const {
  if (!expired()) return;
  if (cancelled_ && cancelled_->load()) throw Error("timeout", "cancelled");
  throw Error("timeout", "not finished within " + format_number(timeout_seconds_) + " s");
}

// Random access to the bytes of a Source; what stands behind FFmpeg's AVIOContext.
class ByteReader {
 public:
  // `deadline` is looked at whenever bytes are wanted.
  ByteReader(const Source& source, int64_t max_bytes, const Deadline& deadline) : deadline_(deadline) {
    if (source.path.empty()) {
      memory_ = source.memory;
      length_ = static_cast<int64_t>(memory_.size());
      return;
    }
    // O_NONBLOCK: opening a FIFO without a writer must not hang; regular files ignore it.
    file_ = ::open(source.path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (file_ < 0) throw Error("open", system_error(errno));
    struct stat status{};
    if (::fstat(file_, &status) != 0) fail(errno);
    if (S_ISDIR(status.st_mode)) fail(EISDIR);
    if (!S_ISREG(status.st_mode)) {
      slurp(max_bytes);
      return;
    }
    offset_ = source.offset;
    const int64_t available = static_cast<int64_t>(status.st_size) - offset_;
    length_ = source.length < 0 ? available : source.length;
    if (offset_ < 0 || available < 0 || length_ > available) {
      ::close(file_);
      throw Error("open", "bytes [" + std::to_string(offset_) + ", " + std::to_string(offset_ + length_) +
                              ") are not inside the file of " + std::to_string(status.st_size) + " bytes");
    }
  }
  ~ByteReader() {
    if (file_ >= 0) ::close(file_);
  }
  ByteReader(const ByteReader&) = delete;
  ByteReader& operator=(const ByteReader&) = delete;

  int64_t length() const { return length_; }
  void leave_unread(std::vector<Unread> places) { unread_ = std::move(places); }

  static int read(void* opaque, uint8_t* target, int count) {
    auto& self = *static_cast<ByteReader*>(opaque);
    const int64_t wanted = std::min<int64_t>(count, self.length_ - self.position_);
    if (wanted <= 0) return AVERROR_EOF;
    if (self.deadline_.expired()) return AVERROR_EXIT;
    const int64_t wanted_now = wanted == count ? self.wanted_of(count) : wanted;  // the file's end shows by reading
    if (self.file_ < 0) std::memcpy(target, self.memory_.data() + self.position_, static_cast<size_t>(wanted_now));
    if (self.file_ < 0 || wanted_now == 0) {
      self.position_ += wanted;
      return static_cast<int>(wanted);
    }
    for (;;) {
      const ssize_t got = ::pread(self.file_, target, static_cast<size_t>(wanted_now), self.offset_ + self.position_);
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) return AVERROR(errno);
      if (got == 0) return AVERROR_EOF;  // the file was cut while we read it
      const int64_t given = got == wanted_now ? wanted : got;
      self.position_ += given;
      return static_cast<int>(given);
    }
  }

  static int64_t seek(void* opaque, int64_t offset, int whence) {
    auto& self = *static_cast<ByteReader*>(opaque);
    if (whence & AVSEEK_SIZE) return self.length_;
    switch (whence & ~AVSEEK_FORCE) {
      case SEEK_SET:
        break;
      case SEEK_CUR:
        offset += self.position_;
        break;
      case SEEK_END:
        offset += self.length_;
        break;
      default:
        return AVERROR(EINVAL);
    }
    if (offset < 0) return AVERROR(EINVAL);
    return self.position_ = offset;
  }

 private:
  [[noreturn]] void fail(int number) {
    ::close(file_);
    throw Error("open", system_error(number));
  }

  // How many of `count` bytes at the present place have to be read.
  int64_t wanted_of(int count) const {
    const auto at = std::lower_bound(unread_.begin(), unread_.end(), position_,
                                     [](const Unread& place, int64_t position) { return place.position < position; });
    return at != unread_.end() && at->position == position_ && at->size == count ? at->wanted : count;
  }

  // A pipe cannot be seeked, which the index needs: read it to the end, within the limits of size and time.
  void slurp(int64_t max_bytes) {
    try {
      std::vector<uint8_t> chunk(kIoBufferBytes);
      for (;;) {
        deadline_.require();
        pollfd wait{file_, POLLIN, 0};
        if (::poll(&wait, 1, 50) <= 0) continue;
        const ssize_t got = ::read(file_, chunk.data(), chunk.size());
        if (got < 0 && (errno == EINTR || errno == EAGAIN)) continue;
        if (got < 0) throw Error("open", system_error(errno));
        if (got == 0) break;
        owned_.insert(owned_.end(), chunk.begin(), chunk.begin() + got);
        if (static_cast<int64_t>(owned_.size()) > max_bytes) {
          throw Error("limits", "more than max_bytes = " + std::to_string(max_bytes) + " bytes from a pipe");
        }
      }
    } catch (...) {
      ::close(file_);
      throw;
    }
    ::close(file_);
    file_ = -1;
    memory_ = owned_;
    length_ = static_cast<int64_t>(owned_.size());
  }

  const Deadline& deadline_;
  int file_ = -1;
  int64_t offset_ = 0;
  int64_t length_ = 0;
  int64_t position_ = 0;
  std::span<const uint8_t> memory_;
  std::vector<uint8_t> owned_;
  std::vector<Unread> unread_;  // ascending
};

Input::Input(const Source& source, int64_t max_bytes, const Deadline& deadline) : deadline_(deadline) {
  install_log_once();
  take_log();
  reader_ = std::make_unique<ByteReader>(source, max_bytes, deadline_);
  if (reader_->length() == 0) throw Error("header", "no bytes");

  auto* buffer = static_cast<uint8_t*>(av_malloc(kIoBufferBytes));
  if (!buffer) throw std::bad_alloc();
  io_.reset(
      avio_alloc_context(buffer, kIoBufferBytes, 0, reader_.get(), &ByteReader::read, nullptr, &ByteReader::seek));
  if (!io_) {
    av_free(buffer);
    throw std::bad_alloc();
  }

  AVFormatContext* format = avformat_alloc_context();
  if (!format) throw std::bad_alloc();
  format->pb = io_.get();
  format->flags |= AVFMT_FLAG_CUSTOM_IO;
  format->io_open = refuse_open;  // playlists and references must not open other files
  format->interrupt_callback = {
      [](void* opaque) { return static_cast<int>(static_cast<Deadline*>(opaque)->expired()); }, &deadline_};
  const int code = avformat_open_input(&format, "", nullptr, nullptr);  // frees `format` on failure
  format_.reset(format);
  require();
  check(code, "header", "no video container recognised");
}

Input::~Input() = default;

void Input::require() const {
  deadline_.require();
  check(io_->error, "read", "the file");
}

void Input::leave_unread(std::vector<Unread> places) {
  io_->direct = !places.empty();  // FFmpeg then asks for each packet as such, not for a buffer full
  reader_->leave_unread(std::move(places));
}

namespace {

const uint8_t* display_matrix(const AVStream& stream) {
#if LIBAVCODEC_VERSION_INT >= AV_VERSION_INT(60, 31, 102)
  const AVPacketSideData* data = av_packet_side_data_get(
      stream.codecpar->coded_side_data, stream.codecpar->nb_coded_side_data, AV_PKT_DATA_DISPLAYMATRIX);
  return data && data->size >= 9 * sizeof(int32_t) ? data->data : nullptr;
#else
  size_t size = 0;
  const uint8_t* data = av_stream_get_side_data(&stream, AV_PKT_DATA_DISPLAYMATRIX, &size);
  return size >= 9 * sizeof(int32_t) ? data : nullptr;
#endif
}

}  // namespace

Orientation orientation_of(const AVStream& stream) {
  const uint8_t* bytes = display_matrix(stream);
  if (!bytes) return {};
  int32_t matrix[9];
  std::memcpy(matrix, bytes, sizeof(matrix));
  Orientation result;
  const double determinant = static_cast<double>(matrix[0]) * matrix[4] - static_cast<double>(matrix[1]) * matrix[3];
  if (determinant < 0) {
    result.mirrored = true;
    matrix[0] = -matrix[0];  // undo the mirror: what is left is a pure rotation
    matrix[1] = -matrix[1];
  }
  const double counter_clockwise = av_display_rotation_get(matrix);
  if (std::isnan(counter_clockwise)) return {};
  const long quarters = std::lround(-counter_clockwise / 90.0);
  result.degrees = static_cast<int>(((quarters % 4) + 4) % 4 * 90);
  return result;
}

}  // namespace pyvdl
