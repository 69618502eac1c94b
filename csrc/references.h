// Which coded frames a wanted frame needs, told by the references that frames list (AV1). Pure; no FFmpeg calls.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <utility>
#include <vector>

namespace pyvdl {

// What the header of an AV1 sequence says that the headers of its frames are read with.
struct Av1Sequence {
  bool reduced = false;
  bool times_in_frames = false;  // frames carry presentation times
  bool decoder_model = false;
  int presentation_time_bits = 0, removal_time_bits = 0;
  std::vector<bool> removal_times;  // by operating point: frames carry a removal time for it
  int frame_id_bits = 0, frame_id_delta_bits = 0;
  int order_hint_bits = 0;
  int screen_content = 2, integer_mv = 2;  // 2: each frame says
};

class Av1References {
 public:
  // Takes the packets of a stream in decoding order, each one temporal unit.
  void add(std::span<const uint8_t> packet);
  // False once a packet held something that is not followed here (layers, short signalling, damage).
  bool known() const { return known_; }

  using Marks = std::vector<uint8_t>;  // by coded frame
  // The coded frames without which the pictures of these packets (ascending) cannot be decoded.
  Marks needed(std::span<const int64_t> packets) const;
  // Coded frames of a packet: [first, last).
  std::pair<size_t, size_t> frames_of(int64_t packet) const;
  // Byte range of a coded frame in its packet.
  std::pair<size_t, size_t> bytes_of(size_t frame) const { return {frames_[frame].begin, frames_[frame].end}; }
  // The coded frame that a packet shows.
  std::optional<size_t> shown_by(int64_t packet) const;
  size_t num_frames() const { return frames_.size(); }

 private:
  static constexpr int kSlots = 8, kReferences = 7;
  struct Frame {
    uint32_t begin = 0, end = 0;  // bytes in the packet
    bool shown = false, key = false;
    bool existing = false;  // shows what was decoded before; `needs` names it
    std::array<int32_t, kReferences> needs = {-1, -1, -1, -1, -1, -1, -1};  // coded frames
  };

  bool read_packet(std::span<const uint8_t> packet);
  bool read_frame(std::span<const uint8_t> header, Frame& frame);

  bool known_ = true;
  std::optional<Av1Sequence> sequence_;
  std::vector<Frame> frames_;
  std::vector<size_t> first_frames_;  // by packet
  std::array<int32_t, kSlots> slots_ = {-1, -1, -1, -1, -1, -1, -1, -1};
};

}  // namespace pyvdl
