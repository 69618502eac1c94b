// The list of a video stream's packets and what follows from it: which frames are shown, in which order, and where
// decoding must start to get one of them exactly. Pure; no FFmpeg calls.
#pragma once

#include <cstdint>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include "bitstream.h"
#include "sampling.h"

namespace pyvdl {

inline constexpr int64_t kNoTime = std::numeric_limits<int64_t>::min();  // equals AV_NOPTS_VALUE

// One packet, in decoding order. Times are ticks of the stream's time base.
struct IndexEntry {
  int64_t pts = kNoTime;
  int64_t dts = kNoTime;
  int64_t position_bytes = -1;  // in the file; -1: unknown
  int64_t duration = 0;         // 0: unknown
  int size_bytes = 0;
  bool key = false;        // the container or parser calls it a key frame
  bool discarded = false;  // decoded but cut from the presentation by an edit list
  PacketFacts facts;
};

// Seconds in a tick, as a fraction: dividing last gives the double nearest to the true time.
struct TimeBase {
  int numerator = 1;
  int denominator = 1;
  double seconds(int64_t ticks) const { return static_cast<double>(ticks) * numerator / denominator; }
};

// Frames are numbered by `rank`: 0 is the first shown one. Packets are numbered by `ordinal`: 0 is the first in the
// file.
class PacketIndex {
 public:
  PacketIndex() = default;
  // Orders frames by pts. `complete()` is false where pts are missing or repeated; then the order has to be decoded.
  PacketIndex(std::vector<IndexEntry> packets, TimeBase time_base, int64_t usual_duration);
  // Orders frames as a decoder puts them out; `output` holds the ordinals.
  void set_order(const std::vector<int64_t>& output);
  // The order in which an MPEG-4 decoder puts pictures out, told by their types alone: B pictures at once, each other
  // one when the next such is read. Nothing where packets hold two pictures or none.
  std::optional<std::vector<int64_t>> order_by_type() const;
  std::vector<int64_t> stored_order() const;  // of all pictures

  bool complete() const { return complete_; }
  // The file starts with pictures that need others before it: those before the first entry, and those shown before an
  // open first entry. Decoders leave them out.
  bool starts_undecodable() const;
  void leave_out_undecodable_start();
  int64_t num_frames() const { return static_cast<int64_t>(shown_.size()); }
  int64_t num_packets() const { return static_cast<int64_t>(packets_.size()); }
  const IndexEntry& packet(int64_t ordinal) const { return packets_[static_cast<size_t>(ordinal)]; }

  int64_t ordinal(int64_t rank) const { return shown_[static_cast<size_t>(rank)]; }
  int64_t rank(int64_t ordinal) const { return ranks_[static_cast<size_t>(ordinal)]; }  // -1: not shown

  const std::vector<int64_t>& pts() const { return pts_; }                             // by rank, ticks
  const std::vector<double>& pts_seconds() const { return pts_seconds_; }              // by rank
  const std::vector<double>& durations_seconds() const { return durations_seconds_; }  // by rank
  const std::vector<int64_t>& key_ranks() const { return key_ranks_; }  // frames decodable alone, ascending
  const Timeline& timeline() const { return timeline_; }                // seconds from the first shown frame

  // Ordinal of the packet at which decoding must start so that frame `rank` comes out exact.
  int64_t start_for(int64_t rank) const;
  // The entry packet before `ordinal`, 0 if there is none.
  int64_t entry_before(int64_t ordinal) const;
  // Some packets hold two pictures. The second comes out in the name of the packet after, and so does what that holds:
  // no packet can be left out.
  bool packed() const { return packed_; }
  // No other picture needs this packet.
  bool disposable(int64_t ordinal) const { return disposable(packet(ordinal).facts); }
  bool disposable(const PacketFacts& facts) const;
  bool any_disposable() const { return any_disposable_; }
  // An error in packet `ordinal` shows in frame `rank`, directly or through references.
  bool spoils(int64_t ordinal, int64_t rank) const;
  // Decoding that starts at packet `start` gives the picture of packet `ordinal` exactly.
  bool exact_from(int64_t start, int64_t ordinal) const;
  // Frame `rank` is shown after the picture of packet `ordinal`.
  bool shown_after(int64_t rank, int64_t ordinal) const;
  // How many frames a decoder must hold back to put them out in order.
  int reorder_depth() const { return reorder_depth_; }
  // Ordinal of the packet of this size that begins at this byte; -1 if there is none or places are not unique.
  int64_t locate(int64_t position_bytes, int size_bytes) const;

 private:
  void number_frames(const std::vector<int64_t>& presentation);
  bool is_entry(int64_t ordinal) const;
  bool undecodable_at_start(int64_t ordinal) const;

  std::vector<IndexEntry> packets_;
  std::vector<int64_t> shown_;    // rank -> ordinal
  std::vector<int64_t> ranks_;    // ordinal -> rank
  std::vector<int64_t> order_;    // ordinal -> place in the presentation, cut frames included
  std::vector<int64_t> entries_;  // ordinals, ascending
  std::vector<int64_t> pts_;
  std::vector<double> pts_seconds_;
  std::vector<double> durations_seconds_;
  std::vector<int64_t> key_ranks_;
  Timeline timeline_;
  std::vector<std::pair<int64_t, int64_t>> positions_;  // byte -> ordinal, ascending; empty: not unique
  TimeBase time_base_;
  int64_t usual_duration_ = 0;
  int reorder_depth_ = 0;
  uint8_t top_layer_ = 0;
  bool packed_ = false;
  bool any_disposable_ = false;
  bool doubtful_ = false;
  bool complete_ = false;
};

}  // namespace pyvdl
