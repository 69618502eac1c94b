// RAII owners of FFmpeg objects, the one error type, byte sources and the guarded demuxer input.
//
// Every difference between FFmpeg versions is settled in ffmpeg.h and ffmpeg.cpp; the other files see one interface.
#pragma once

extern "C" {
#include <libavcodec/avcodec.h>
#include <libavformat/avformat.h>
#include <libavutil/display.h>
#include <libavutil/imgutils.h>
#include <libavutil/opt.h>
#include <libavutil/pixdesc.h>
#include <libswscale/swscale.h>
}

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace pyvdl {

// A fault of one medium. `stage` is one of: open, header, stream, codec, read, decode, convert, sample, limits,
// timeout.
class Error : public std::runtime_error {
 public:
  Error(std::string stage, const std::string& message) : std::runtime_error(message), stage_(std::move(stage)) {}
  const std::string& stage() const { return stage_; }

 private:
  std::string stage_;
};

// Throws Error(stage, "what: FFmpeg's text") when `code` is negative; returns it otherwise.
int check(int code, std::string_view stage, std::string_view what);

// What FFmpeg logged as an error on this thread since the last call; empties the record.
std::string take_log();
bool has_log();

inline bool container_is(const AVFormatContext& format, const char* name) {
  return std::strstr(format.iformat->name, name) != nullptr;
}

struct FormatCloser {
  void operator()(AVFormatContext* p) const { avformat_close_input(&p); }
};
struct IoCloser {
  void operator()(AVIOContext* p) const;
};
struct CodecCloser {
  void operator()(AVCodecContext* p) const { avcodec_free_context(&p); }
};
struct PacketCloser {
  void operator()(AVPacket* p) const { av_packet_free(&p); }
};
struct FrameCloser {
  void operator()(AVFrame* p) const { av_frame_free(&p); }
};
struct SwsCloser {
  void operator()(SwsContext* p) const { sws_freeContext(p); }
};
using FormatPtr = std::unique_ptr<AVFormatContext, FormatCloser>;
using IoPtr = std::unique_ptr<AVIOContext, IoCloser>;
using CodecPtr = std::unique_ptr<AVCodecContext, CodecCloser>;
using PacketPtr = std::unique_ptr<AVPacket, PacketCloser>;
using FramePtr = std::unique_ptr<AVFrame, FrameCloser>;
using SwsPtr = std::unique_ptr<SwsContext, SwsCloser>;

PacketPtr make_packet();
FramePtr make_frame();

// When work on a clip stops with an Error of stage "timeout": after a time, or once `cancelled` is set. Default: never.
class Deadline {
 public:
  Deadline() = default;
  explicit Deadline(std::optional<double> timeout_seconds, const std::atomic<bool>* cancelled = nullptr);
  bool expired() const {
    if (cancelled_ && cancelled_->load(std::memory_order_relaxed)) return true;
    return at_ && std::chrono::steady_clock::now() >= *at_;
  }
  void require() const;  // throws once expired

 private:
  const std::atomic<bool>* cancelled_ = nullptr;
  std::optional<std::chrono::steady_clock::time_point> at_;
  double timeout_seconds_ = 0;
};

// Where the bytes of a video are: a file, a part of a file (a tar member), or memory owned by the caller.
struct Source {
  std::string path;                 // empty for memory
  int64_t offset = 0;               // first byte of the part
  int64_t length = -1;              // bytes of the part; -1: to the end of the file
  std::span<const uint8_t> memory;  // must outlive everything opened from this source
};

// Bytes of the file that need not be read when they are asked for by exactly this place and size.
struct Unread {
  int64_t position = 0;
  int size = 0;
  int wanted = 0;  // bytes at the beginning that are read all the same
};

class ByteReader;

// An opened demuxer over one Source. No protocol is reachable from inside it: FFmpeg gets our reader and nothing else.
// Not thread-safe.
class Input {
 public:
  // `max_bytes` bounds what is read into memory from something that is not a regular file, such as a pipe.
  Input(const Source& source, int64_t max_bytes, const Deadline& deadline);
  ~Input();
  Input(const Input&) = delete;
  Input& operator=(const Input&) = delete;

  AVFormatContext* format() const { return format_.get(); }
  void set_deadline(const Deadline& deadline) { deadline_ = deadline; }
  // Whether a read failed, by the system or the deadline. FFmpeg remembers it: only another Input reads on.
  bool failed() const { return io_->error != 0; }
  // Throws Error when the deadline is over or a read failed. FFmpeg hands a failure on as the end of the file, or as
  // one of the container.
  void require() const;
  // Packets that lie at these places (ascending) come without their bytes from now on: what they point to past `wanted`
  // is undefined. An empty list ends it.
  void leave_unread(std::vector<Unread> places);

 private:
  Deadline deadline_;
  std::unique_ptr<ByteReader> reader_;
  IoPtr io_;
  FormatPtr format_;  // declared last: closed first
};

// Rotation to apply to decoded frames so that they are shown upright: clockwise degrees 0, 90, 180, 270, and whether
// the picture is mirrored left to right before the rotation.
struct Orientation {
  int degrees = 0;
  bool mirrored = false;
};
Orientation orientation_of(const AVStream& stream);

}  // namespace pyvdl
