// Opens one video stream, knows its frames, and decodes exactly the wanted ones.
#pragma once

#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "convert.h"
#include "ffmpeg.h"
#include "packet_index.h"
#include "references.h"

namespace pyvdl {

// Guards against files that would take too much memory or time.
struct Limits {
  int64_t max_pixels = int64_t{1} << 26;  // of one frame
  int64_t max_frames = 5'000'000;         // packets of the stream
  double max_seconds = 7 * 24 * 3600.0;   // of the stream
  int64_t max_bytes = int64_t{4} << 30;   // of one result, and of a pipe read to its end
};

struct DecoderOptions {
  std::optional<int> stream;  // counts video streams from 0; nothing: the best one
  bool conceal = false;       // give frames that were decoded with errors
  bool fast = false;          // no loop filter on (most) frames that are not wanted
  // A mp4 stream up to this size is read whole when it is opened: that takes a millisecond or two, and finds packets so
  // damaged that no picture can come of them. A larger one is opened by the container's tables.
  int64_t read_whole_bytes = int64_t{4} << 20;
  Limits limits;
};

struct DecodeStats {
  int64_t packets_read = 0;
  int64_t packets_sent = 0;
  int64_t frames_decoded = 0;
  int64_t frames_converted = 0;
  int64_t seeks = 0;
};

struct Metadata {
  int64_t num_frames = 0;
  int width = 0;   // of the upright picture
  int height = 0;  // of the upright picture
  double fps = 0;  // average
  double duration_seconds = 0;
  double start_seconds = 0;
  std::string codec;
  std::string pixel_format;
  int rotation = 0;  // clockwise degrees, already applied
  std::string color_space;
  std::string color_range;
  TimeBase time_base;
  int stream_index = 0;  // in the container
  int num_video_streams = 0;
  int reorder_depth = 0;
  std::string container;
  bool truncated = false;  // the container lists packets that are not in the file
};

// What opening a video stream finds out by reading its packets. Once made it is only read, by any number of decoders.
struct StreamIndex {
  PacketIndex packets;
  std::optional<Av1References> references;
  std::vector<uint8_t> encoder_notes;
  bool truncated = false;  // the container lists packets that are not in the file
  // Made of the container's tables and the beginnings of key frames alone: what other packets say of themselves is seen
  // when they are read for decoding.
  bool from_tables = false;
};

// Not thread-safe; uses the calling thread only.
class VideoDecoder {
 public:
  using Sink = std::function<void(int64_t rank, const AVFrame& frame)>;

  // `known`: the index of the same source and stream, if there is one; else it is made.
  VideoDecoder(const Source& source, const DecoderOptions& options, const Deadline& deadline,
               std::shared_ptr<const StreamIndex> known = nullptr);

  const PacketIndex& index() const { return index_->packets; }
  const std::shared_ptr<const StreamIndex>& shared_index() const { return index_; }
  Metadata metadata();  // decodes the first frame when first called
  Orientation orientation() const { return orientation_; }
  const DecodeStats& stats() const { return stats_; }
  const DecoderOptions& options() const { return options_; }
  bool truncated() const { return index_->truncated; }
  void set_deadline(const Deadline& deadline);

  // Decodes the frames of these ranks (ascending, none twice) and hands each to `sink`. Throws Error at the end of a
  // group of pictures when one of its wanted frames was spoiled by an error, unless options.conceal; a frame may have
  // been handed out before this is known, and may be handed out twice. A call that goes on where the last one ended
  // keeps the decoder running, so that reading frame by frame decodes nothing twice.
  void decode(std::span<const int64_t> ranks, const Sink& sink);

  // The next decode() starts afresh, whatever was decoded before.
  void restart() { run_next_ = -1; }

  void count_converted() { ++stats_.frames_converted; }

 private:
  struct Group {  // wanted frames that one run of the decoder gives
    std::span<const int64_t> ranks;
    int64_t start = 0;  // ordinal of the packet to start at
    int64_t last = 0;   // ordinal of the last packet needed
  };

  void open_input();
  void open_codec(int reorder_depth, bool unrecovered);
  void make_index();
  [[noreturn]] void refuse_length() const;
  StreamIndex scan_packets();
  std::optional<StreamIndex> read_tables();
  void finish(StreamIndex& made, std::vector<IndexEntry> packets);
  bool may_read_tables() const;
  void replace_tables();
  PacketInspector inspector() const;
  std::vector<int64_t> find_order();
  std::vector<int64_t> decode_order();
  const std::optional<Av1References>& references() const { return index_->references; }

  int64_t read_packet();           // into packet_; returns its ordinal, -1 at the end or when it cannot be told
  void position(int64_t ordinal);  // the next read_packet() gives this ordinal
  bool seek_near(int64_t ordinal);

  Group next_group(std::span<const int64_t> ranks) const;
  bool resumable(const Group& group) const;
  Av1References::Marks needed_by(const Group& group) const;
  void run_groups(std::span<const int64_t> ranks, const Sink& sink);
  void run_group(const Group& group, int64_t good, const Sink& sink);
  void attempt(const Group& group, int64_t start, const Sink& sink);
  void start_run(int64_t start);
  void feed(int64_t ordinal, const Sink& sink);
  bool leave_out_unneeded(int64_t ordinal);
  void send(const AVPacket* packet, const Sink& sink);
  void receive(const Sink& sink);
  void note_error(int64_t ordinal, int code, const char* cause = nullptr);
  bool spoils(int64_t ordinal, int64_t rank) const;
  std::string fault_of(int64_t rank) const;  // empty: the frame came out, without errors
  void conceal_missing(const Group& group, const Sink& sink);

  Source source_;
  DecoderOptions options_;
  Deadline deadline_;
  std::unique_ptr<Input> input_;
  AVStream* stream_ = nullptr;
  CodecPtr codec_;
  PacketPtr packet_ = make_packet();
  FramePtr frame_ = make_frame();
  std::shared_ptr<const StreamIndex> index_;
  std::shared_ptr<const StreamIndex>
      tables_;                                // what index_ was before its packets contradicted it: callers may hold it
  std::optional<PacketInspector> inspector_;  // where the index does not tell all
  Orientation orientation_;
  DecodeStats stats_;
  int num_video_streams_ = 0;
  std::optional<Metadata> metadata_;

  int64_t next_packet_ = 0;  // ordinal that read_packet() gives next; -1: told by the packet's place in the file
  bool held_ = false;        // packet_ already is that packet

  // The run: what the decoder has been given since its last flush.
  enum : uint8_t { kWanted = 1, kOut = 2, kGiven = 4, kDisposable = 8 };
  std::vector<uint8_t> state_;   // by ordinal
  std::vector<int64_t> errors_;  // ordinals of packets and frames with errors
  std::string error_text_;       // of the first of them
  Av1References::Marks needed_;  // of the group
  Av1References::Marks given_;   // in this run
  int64_t unfiltered_from_ = 0;  // ordinal, with options.fast
  int64_t run_start_ = 0;
  int64_t run_next_ = -1;     // ordinal to give next; -1: no run
  bool draining_ = false;     // the decoder was told that no packet follows
  int64_t outstanding_ = 0;   // wanted frames that did not come out yet
  int64_t first_wanted_ = 0;  // rank
  bool follow_ = false;       // frames after the wanted ones will be asked for next
  int64_t last_asked_ = -1;   // rank
};

}  // namespace pyvdl
