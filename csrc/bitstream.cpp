#include "bitstream.h"

#include <algorithm>
#include <cstddef>

namespace pyvdl {
namespace {

using Bytes = std::span<const uint8_t>;

constexpr size_t kMarkerBytes = 19;  // FFmpeg's own bound of a VOP that is not coded

// A packet, of which the bytes after the first ones may not be at hand.
struct Packet {
  Bytes bytes;
  size_t size = 0;  // of all
};

// Calls `visit(nal unit)` for each NAL unit that begins at hand, with its bytes at hand; returns false where a length
// prefix runs over the packet's end.
template <typename Visit>
bool each_nal(Packet packet, int prefix_bytes, Visit visit) {
  const Bytes bytes = packet.bytes;
  if (prefix_bytes > 0) {
    size_t at = 0;
    while (at + static_cast<size_t>(prefix_bytes) <= bytes.size()) {
      uint64_t length = 0;
      for (int i = 0; i < prefix_bytes; ++i) length = length << 8 | bytes[at++];
      if (length > packet.size - at) return false;
      if (length > 0 && at < bytes.size()) visit(bytes.subspan(at, std::min<size_t>(length, bytes.size() - at)));
      at += length;
    }
    return true;
  }
  size_t start = bytes.size();  // of the NAL unit being read; bytes.size(): none yet
  for (size_t i = 0; i + 3 <= bytes.size(); ++i) {
    if (bytes[i] != 0 || bytes[i + 1] != 0 || bytes[i + 2] != 1) continue;
    if (start < i) visit(bytes.subspan(start, i - start));
    start = i + 3;
    i += 2;
  }
  if (start < bytes.size()) visit(bytes.subspan(start));
  return true;
}

// Reads an H.264 SEI unit: does it hold a recovery point that takes effect at once (recovery_frame_cnt 0)?
bool recovers_at_once(Bytes nal) {
  size_t at = 1;
  while (at + 2 <= nal.size()) {
    uint32_t type = 0, size = 0;
    while (at < nal.size() && nal[at] == 0xFF) type += nal[at++];
    if (at >= nal.size()) return false;
    type += nal[at++];
    while (at < nal.size() && nal[at] == 0xFF) size += nal[at++];
    if (at >= nal.size()) return false;
    size += nal[at++];
    if (type == 6) return at < nal.size() && (nal[at] & 0x80);  // ue(v) of 0 is the single bit 1
    at += size;
  }
  return false;
}

PacketFacts inspect_h264(Packet packet, int prefix_bytes) {
  PacketFacts facts;
  facts.picture = false;
  bool idr = false, recovery = false, referenced = false, parameters = false;
  facts.damaged = !each_nal(packet, prefix_bytes, [&](Bytes nal) {
    const int type = nal[0] & 31;
    if (type >= 1 && type <= 5) {
      facts.picture = true;
      referenced |= (nal[0] & 0x60) != 0;
      idr |= type == 5;
    } else if (type == 6) {
      recovery |= recovers_at_once(nal);
    } else if (type == 7 || type == 8 || type > 12) {
      parameters = true;
    }
  });
  facts.disposable = facts.picture && !referenced && !parameters && !facts.damaged;
  facts.entry = idr ? Entry::clean : recovery ? Entry::open : Entry::none;
  return facts;
}

PacketFacts inspect_hevc(Packet packet, int prefix_bytes) {
  PacketFacts facts;
  facts.picture = false;
  facts.entry = Entry::none;
  bool referenced = false, parameters = false;
  facts.damaged = !each_nal(packet, prefix_bytes, [&](Bytes nal) {
    if (nal.size() < 2) return;
    const int type = nal[0] >> 1 & 63;
    if (type < 32) {
      facts.picture = true;
      facts.temporal_layer = std::max<uint8_t>(facts.temporal_layer, static_cast<uint8_t>((nal[1] & 7) - 1));
      referenced |= type > 14 || type % 2 != 0;  // odd types up to 15 are sub-layer reference pictures
      facts.decodable_leading |= type == 6 || type == 7;
      if (type == 19 || type == 20) facts.entry = Entry::clean;
      if (type >= 16 && type <= 21 && facts.entry == Entry::none) facts.entry = Entry::open;
    } else if (type <= 34 || type > 40) {
      parameters = true;
    }
  });
  facts.disposable = facts.picture && !referenced && !parameters && !facts.damaged;
  return facts;
}

PacketFacts inspect_vp8(Bytes packet) {
  PacketFacts facts;
  facts.entry = Entry::clean;
  facts.picture = !packet.empty();
  facts.hidden = !packet.empty() && !(packet[0] & 0x10);
  return facts;
}

PacketFacts inspect_vp9(Bytes packet) {
  PacketFacts facts;
  facts.entry = Entry::clean;
  facts.picture = !packet.empty();
  if (packet.empty() || (packet.back() & 0xE0) == 0xC0) return facts;  // a superframe ends in a shown frame
  // frame_marker(2) profile_low(1) profile_high(1) [reserved(1) if profile 3] show_existing(1) frame_type(1) show(1)
  int bit = (packet[0] & 0x30) == 0x30 ? 5 : 4;
  const auto take = [&] { return packet[0] >> (7 - bit++) & 1; };
  if (take()) return facts;  // shows an existing frame
  take();
  facts.hidden = bit < 8 ? !take() : false;
  return facts;
}

PacketFacts inspect_mpeg4(Bytes packet) {
  PacketFacts facts;
  facts.picture = false;
  for (size_t i = 0; i + 5 <= packet.size(); ++i) {
    if (packet[i] != 0 || packet[i + 1] != 0 || packet[i + 2] != 1 || packet[i + 3] != 0xB6) continue;
    if (facts.picture) {
      facts.packed = true;
      break;
    }
    facts.picture = true;
    facts.backward = packet[i + 4] >> 6 == 2;
    i += 4;
  }
  facts.disposable = facts.backward;
  facts.doubtful = packet.size() <= kMarkerBytes && !facts.backward;
  return facts;
}

PacketFacts inspect_mpeg2(Bytes packet) {
  PacketFacts facts;
  facts.picture = false;
  for (size_t i = 0; i + 6 <= packet.size(); ++i) {
    if (packet[i] != 0 || packet[i + 1] != 0 || packet[i + 2] != 1 || packet[i + 3] != 0) continue;
    facts.picture = true;
    facts.backward = (packet[i + 5] >> 3 & 7) == 3;
    break;
  }
  facts.disposable = facts.backward;
  return facts;
}

}  // namespace

PacketInspector::PacketInspector(AVCodecID codec, Bytes extradata) : codec_(codec) {
  if (codec == AV_CODEC_ID_H264 && extradata.size() >= 7 && extradata[0] == 1) prefix_bytes_ = (extradata[4] & 3) + 1;
  if (codec == AV_CODEC_ID_HEVC && extradata.size() >= 23 && (extradata[0] || extradata[1] || extradata[2] > 1)) {
    prefix_bytes_ = (extradata[21] & 3) + 1;
    one_layer_ = (extradata[21] >> 3 & 7) == 1;
  }
}

std::vector<uint8_t> PacketInspector::encoder_notes(Bytes packet) const {
  std::vector<uint8_t> notes;
  if (codec_ != AV_CODEC_ID_H264) return notes;
  each_nal({packet, packet.size()}, prefix_bytes_, [&](Bytes nal) {
    if (nal.size() < 2 || (nal[0] & 31) != 6 || nal[1] != 5) return;  // SEI, user data
    if (prefix_bytes_ == 0) notes.insert(notes.end(), {0, 0, 1});
    for (int i = prefix_bytes_ - 1; i >= 0; --i) notes.push_back(static_cast<uint8_t>(nal.size() >> (8 * i)));
    notes.insert(notes.end(), nal.begin(), nal.end());
  });
  return notes;
}

PacketFacts PacketInspector::inspect(Bytes packet, size_t packet_bytes) const {
  switch (codec_) {
    case AV_CODEC_ID_H264:
      return inspect_h264({packet, packet_bytes}, prefix_bytes_);
    case AV_CODEC_ID_HEVC:
      return inspect_hevc({packet, packet_bytes}, prefix_bytes_);
    case AV_CODEC_ID_MPEG4:
      return inspect_mpeg4(packet);
    case AV_CODEC_ID_MPEG1VIDEO:
    case AV_CODEC_ID_MPEG2VIDEO:
      return inspect_mpeg2(packet);
    case AV_CODEC_ID_VP8:
      return inspect_vp8(packet);
    case AV_CODEC_ID_VP9:
      return inspect_vp9(packet);
    default:
      return {.picture = !packet.empty()};
  }
}

}  // namespace pyvdl
