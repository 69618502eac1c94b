#include "references.h"

#include <algorithm>

namespace pyvdl {
namespace {

enum Obu { kSequence = 1, kFrameHeader = 3, kTileGroup = 4, kFrame = 6, kRepeatedHeader = 7, kTileList = 8 };
enum FrameType { kKey = 0, kInter = 1, kIntraOnly = 2, kSwitch = 3 };

// Reads bits from the first on; beyond the end they are 0 and `overrun` is set.
class Bits {
 public:
  explicit Bits(std::span<const uint8_t> bytes) : bytes_(bytes) {}
  uint32_t take(int count) {
    uint32_t value = 0;
    for (int i = 0; i < count; ++i, ++at_) {
      if (at_ / 8 >= bytes_.size()) overrun_ = true;
      value = value << 1 | (overrun_ ? 0U : bytes_[at_ / 8] >> (7 - at_ % 8) & 1U);
    }
    return value;
  }
  bool flag() { return take(1) != 0; }
  void skip_uvlc() {
    int zeros = 0;
    while (!flag() && zeros < 32 && !overrun_) ++zeros;
    take(zeros < 32 ? zeros : 0);
  }
  bool overrun() const { return overrun_; }

 private:
  std::span<const uint8_t> bytes_;
  size_t at_ = 0;
  bool overrun_ = false;
};

// Section 5.5 of the AV1 specification, as far as frame headers need it.
std::optional<Av1Sequence> read_sequence(std::span<const uint8_t> payload) {
  Bits bits(payload);
  Av1Sequence sequence;
  bits.take(3 + 1);  // profile, still picture
  sequence.reduced = bits.flag();
  if (sequence.reduced) {
    bits.take(5);  // level
  } else {
    bool equal_interval = false;
    int delay_bits = 0;
    if (bits.flag()) {  // timing information
      bits.take(32);
      bits.take(32);
      equal_interval = bits.flag();
      if (equal_interval) bits.skip_uvlc();
      sequence.decoder_model = bits.flag();
      if (sequence.decoder_model) {
        delay_bits = static_cast<int>(bits.take(5)) + 1;
        bits.take(32);
        sequence.removal_time_bits = static_cast<int>(bits.take(5)) + 1;
        sequence.presentation_time_bits = static_cast<int>(bits.take(5)) + 1;
      }
    }
    sequence.times_in_frames = sequence.decoder_model && !equal_interval;
    const bool display_delay = bits.flag();
    const uint32_t points = bits.take(5) + 1;
    for (uint32_t i = 0; i < points; ++i) {
      if (bits.take(12) != 0) return std::nullopt;  // scalable
      if (bits.take(5) > 7) bits.take(1);           // level, tier
      const bool model = sequence.decoder_model && bits.flag();
      if (model) {
        bits.take(delay_bits);
        bits.take(delay_bits);
        bits.take(1);
      }
      sequence.removal_times.push_back(model);
      if (display_delay && bits.flag()) bits.take(4);
    }
  }
  const int width_bits = static_cast<int>(bits.take(4)) + 1;
  const int height_bits = static_cast<int>(bits.take(4)) + 1;
  bits.take(width_bits);
  bits.take(height_bits);
  if (!sequence.reduced && bits.flag()) {
    sequence.frame_id_delta_bits = static_cast<int>(bits.take(4)) + 2;
    sequence.frame_id_bits = static_cast<int>(bits.take(3)) + sequence.frame_id_delta_bits + 1;
  }
  bits.take(3);  // block size, filter intra, edge filter
  if (!sequence.reduced) {
    bits.take(4);  // inter-intra, masks, warped motion, dual filter
    const bool order_hints = bits.flag();
    if (order_hints) bits.take(2);
    sequence.screen_content = bits.flag() ? 2 : static_cast<int>(bits.take(1));
    if (sequence.screen_content > 0) sequence.integer_mv = bits.flag() ? 2 : static_cast<int>(bits.take(1));
    if (order_hints) sequence.order_hint_bits = static_cast<int>(bits.take(3)) + 1;
  }
  if (bits.overrun()) return std::nullopt;
  return sequence;
}

}  // namespace

void Av1References::add(std::span<const uint8_t> packet) {
  first_frames_.push_back(frames_.size());
  if (known_) known_ = read_packet(packet);
}

bool Av1References::read_packet(std::span<const uint8_t> packet) {
  bool open = false;  // a frame whose tile groups are to come
  for (size_t at = 0; at < packet.size();) {
    const size_t begin = at;
    const uint8_t header = packet[at++];
    const int type = header >> 3 & 15;
    if (header & 0x80) return false;
    if (header & 4) {
      if (at >= packet.size() || (packet[at++] >> 3 & 3) != 0) return false;  // spatial layers
    }
    uint64_t size = packet.size() - at;
    if (header & 2) {
      size = 0;
      for (int i = 0; i < 8; ++i) {
        if (at >= packet.size()) return false;
        const uint8_t byte = packet[at++];
        size |= static_cast<uint64_t>(byte & 127) << (7 * i);
        if (!(byte & 128)) break;
      }
      if (size > packet.size() - at) return false;
    }
    const auto payload = packet.subspan(at, static_cast<size_t>(size));
    at += static_cast<size_t>(size);
    if (type == kSequence) {
      sequence_ = read_sequence(payload);
      if (!sequence_) return false;
    } else if (type == kFrameHeader || type == kFrame) {
      // A header may be repeated under its own type: that is no new frame.
      if (open && type == kFrameHeader) {
        frames_.back().end = static_cast<uint32_t>(at);
        continue;
      }
      Frame frame;
      frame.begin = static_cast<uint32_t>(begin);
      frame.end = static_cast<uint32_t>(at);
      if (!sequence_ || !read_frame(payload, frame)) return false;
      open = type == kFrameHeader && !frames_.back().existing;
    } else if (type == kTileGroup || type == kRepeatedHeader) {
      if (frames_.size() == first_frames_.back()) return false;
      frames_.back().end = static_cast<uint32_t>(at);
    } else if (type == kTileList) {
      return false;
    }
  }
  return true;
}

// Section 5.9.2 up to the references, and what the frame leaves in the slots (7.20). Appends `frame`.
bool Av1References::read_frame(std::span<const uint8_t> header, Frame& frame) {
  const Av1Sequence& sequence = *sequence_;
  Bits bits(header);
  const auto id = static_cast<int32_t>(frames_.size());
  uint32_t type = kKey;
  bool error_resilient = true;
  frame.shown = true;
  if (!sequence.reduced) {
    if (bits.flag()) {  // shows a frame that was decoded before
      const int32_t existing = slots_[bits.take(3)];
      if (existing < 0) return false;
      frame.existing = true;
      frame.needs[0] = existing;
      frame.key = frames_[static_cast<size_t>(existing)].key;
      frames_.push_back(frame);
      if (frame.key) slots_.fill(id);
      return true;
    }
    type = bits.take(2);
    frame.shown = bits.flag();
    if (frame.shown && sequence.times_in_frames) bits.take(sequence.presentation_time_bits);
    if (!frame.shown) bits.take(1);  // showable
    error_resilient = type == kSwitch || (type == kKey && frame.shown) || bits.flag();
  }
  const bool intra = type == kKey || type == kIntraOnly;
  frame.key = type == kKey;
  bits.take(1);  // CDF update
  const uint32_t screen_content =
      sequence.screen_content == 2 ? bits.take(1) : static_cast<uint32_t>(sequence.screen_content);
  if (screen_content && sequence.integer_mv == 2) bits.take(1);
  if (sequence.frame_id_bits) bits.take(sequence.frame_id_bits);
  if (type != kSwitch && !sequence.reduced) bits.take(1);  // size override
  bits.take(sequence.order_hint_bits);
  if (!intra && !error_resilient) bits.take(3);  // the reference whose contexts are taken over: one of those below
  if (sequence.decoder_model && bits.flag()) {
    for (const bool present : sequence.removal_times) {
      if (present) bits.take(sequence.removal_time_bits);
    }
  }
  const bool refresh_all = type == kSwitch || (type == kKey && frame.shown);
  const uint32_t refresh = refresh_all ? 255 : bits.take(8);
  if ((!intra || refresh != 255) && error_resilient && sequence.order_hint_bits) {
    for (int i = 0; i < kSlots; ++i) bits.take(sequence.order_hint_bits);
  }
  if (!intra) {
    if (sequence.order_hint_bits && bits.flag()) return false;  // short signalling
    for (int32_t& need : frame.needs) {
      need = slots_[bits.take(3)];
      if (need < 0) return false;
      if (sequence.frame_id_bits) bits.take(sequence.frame_id_delta_bits);
    }
  }
  if (bits.overrun()) return false;
  frames_.push_back(frame);
  for (int i = 0; i < kSlots; ++i) {
    if (refresh >> i & 1) slots_[static_cast<size_t>(i)] = id;
  }
  return true;
}

std::pair<size_t, size_t> Av1References::frames_of(int64_t packet) const {
  const auto at = static_cast<size_t>(packet);
  return {first_frames_[at], at + 1 < first_frames_.size() ? first_frames_[at + 1] : frames_.size()};
}

std::optional<size_t> Av1References::shown_by(int64_t packet) const {
  auto [first, last] = frames_of(packet);
  while (last-- > first) {
    if (frames_[last].shown) return last;
  }
  return std::nullopt;
}

Av1References::Marks Av1References::needed(std::span<const int64_t> packets) const {
  Marks marks(frames_.size(), 0);
  size_t last = 0;
  for (const int64_t packet : packets) {
    if (const std::optional<size_t> frame = shown_by(packet)) {
      marks[*frame] = 1;
      last = std::max(last, *frame + 1);
    }
  }
  while (last-- > 0) {  // needs come before what needs them
    if (!marks[last]) continue;
    for (const int32_t need : frames_[last].needs) {
      if (need >= 0) marks[static_cast<size_t>(need)] = 1;
    }
  }
  return marks;
}

}  // namespace pyvdl
