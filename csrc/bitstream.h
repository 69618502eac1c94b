// What a coded packet says about itself without being decoded: does it hold a picture, may it be dropped, can decoding
// start at it. Pure functions over bytes; no FFmpeg types beyond the codec id.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

extern "C" {
#include <libavcodec/codec_id.h>
}

namespace pyvdl {

// Where decoding may start.
enum class Entry : uint8_t {
  none,   // needs pictures before it
  open,   // pictures shown before it that follow it in the stream need pictures before it
  clean,  // nothing after it needs anything before it
};

struct PacketFacts {
  bool picture = true;        // it holds (a part of) a picture
  bool hidden = false;        // the picture is never shown (VP8 and VP9 alternate references)
  bool disposable = false;    // no other picture refers to it and it carries no parameter sets
  bool damaged = false;       // its structure contradicts itself
  Entry entry = Entry::open;  // meaningful for packets the container flags as key frames
  uint8_t temporal_layer = 0;
  bool decodable_leading = false;  // shown before the entry it follows, without needing anything before that (HEVC)
  bool backward = false;  // a B picture, known for MPEG-1, 2 and 4: shown at once, while others wait for the next such
  bool packed = false;    // it holds a second picture, as MPEG-4 in AVI may
  bool doubtful = false;  // so small that it may be a place marker instead of a picture (MPEG-4)
};

class PacketInspector {
 public:
  // `extradata` tells whether H.264 and HEVC come with length prefixes (mp4, mkv) or start codes (ts).
  PacketInspector(AVCodecID codec, std::span<const uint8_t> extradata);
  PacketFacts inspect(std::span<const uint8_t> packet) const { return inspect(packet, packet.size()); }
  // Of a packet of which only the beginning is at hand. What does not show there is not told; `picture` is false where
  // no picture begins there.
  PacketFacts inspect(std::span<const uint8_t> beginning, size_t packet_bytes) const;
  // H.264 only: the units in which the encoder names itself. They come with the first packet, and the decoder follows
  // them to undo the known faults of that encoder (x264 in 4:4:4), so decoding that starts elsewhere needs them too.
  std::vector<uint8_t> encoder_notes(std::span<const uint8_t> packet) const;
  // H.264 and HEVC in mp4: the header tells enough for packets to be judged one by one, when they are needed.
  bool judges_singly() const { return prefix_bytes_ > 0 && one_layer_; }

 private:
  AVCodecID codec_;
  int prefix_bytes_ = 0;   // of the NAL unit length; 0: start codes
  bool one_layer_ = true;  // no temporal layers, whose number decides on what is disposable
};

}  // namespace pyvdl
