#include "packet_index.h"

#include <algorithm>

namespace pyvdl {

PacketIndex::PacketIndex(std::vector<IndexEntry> packets, TimeBase time_base, int64_t usual_duration)
    : packets_(std::move(packets)), time_base_(time_base), usual_duration_(usual_duration) {
  complete_ = true;
  std::vector<int64_t> presentation;
  bool first_entry_seen = false;
  for (int64_t i = 0; i < num_packets(); ++i) {
    const IndexEntry& entry = packet(i);
    packed_ |= entry.facts.packed;
    doubtful_ |= entry.facts.doubtful;
    top_layer_ = std::max(top_layer_, entry.facts.temporal_layer);
    if (is_entry(i)) entries_.push_back(i), first_entry_seen = true;
    if (entry.position_bytes >= 0) positions_.emplace_back(entry.position_bytes, i);
    if (!entry.facts.picture || entry.facts.hidden) continue;
    if (entry.pts == kNoTime) complete_ = false;
    presentation.push_back(i);
  }
  if (!first_entry_seen || doubtful_ || packed_) complete_ = false;
  std::sort(positions_.begin(), positions_.end());
  const auto repeated = std::adjacent_find(positions_.begin(), positions_.end(),
                                           [](const auto& a, const auto& b) { return a.first == b.first; });
  if (repeated != positions_.end() || positions_.size() != packets_.size()) positions_.clear();

  if (complete_) {
    std::stable_sort(presentation.begin(), presentation.end(),
                     [&](int64_t a, int64_t b) { return packet(a).pts < packet(b).pts; });
    const auto same = std::adjacent_find(presentation.begin(), presentation.end(),
                                         [&](int64_t a, int64_t b) { return packet(a).pts == packet(b).pts; });
    if (same != presentation.end()) complete_ = false;
  }
  for (int64_t i = 0; i < num_packets() && !any_disposable_; ++i) any_disposable_ = disposable(i);
  number_frames(presentation);
}

void PacketIndex::set_order(const std::vector<int64_t>& output) {
  for (IndexEntry& entry : packets_) entry.facts.hidden = true;  // what did not come out is not shown
  for (const int64_t ordinal : output) packets_[static_cast<size_t>(ordinal)].facts.hidden = false;
  number_frames(output);
  complete_ = true;
}

bool PacketIndex::undecodable_at_start(int64_t ordinal) const {
  if (order_[static_cast<size_t>(ordinal)] < 0 || entries_.empty()) return false;
  const int64_t first = entries_.front();
  return ordinal < first || !(exact_from(first, ordinal) || packet(ordinal).facts.decodable_leading);
}

bool PacketIndex::starts_undecodable() const {
  for (int64_t i = 0; i < num_packets(); ++i) {
    if (undecodable_at_start(i)) return true;
  }
  return false;
}

void PacketIndex::leave_out_undecodable_start() {
  std::vector<int64_t> rest;
  for (int64_t i = 0; i < num_packets(); ++i) {
    if (order_[static_cast<size_t>(i)] >= 0 && !undecodable_at_start(i)) rest.push_back(i);
  }
  std::sort(rest.begin(), rest.end(),
            [&](int64_t a, int64_t b) { return order_[static_cast<size_t>(a)] < order_[static_cast<size_t>(b)]; });
  set_order(rest);
}

std::optional<std::vector<int64_t>> PacketIndex::order_by_type() const {
  if (packed_ || doubtful_) return std::nullopt;
  std::vector<int64_t> output;
  int64_t waiting = -1;
  int references = 0;
  for (int64_t i = 0; i < num_packets(); ++i) {
    const PacketFacts& facts = packet(i).facts;
    if (!facts.picture) continue;
    if (facts.backward) {
      if (references >= 2) output.push_back(i);  // without two references it cannot be decoded
      continue;
    }
    if (waiting >= 0) output.push_back(waiting);
    waiting = i;
    ++references;
  }
  if (waiting >= 0) output.push_back(waiting);
  return output;
}

std::vector<int64_t> PacketIndex::stored_order() const {
  std::vector<int64_t> output;
  for (int64_t i = 0; i < num_packets(); ++i) {
    if (packet(i).facts.picture && !packet(i).facts.hidden) output.push_back(i);
  }
  return output;
}

void PacketIndex::number_frames(const std::vector<int64_t>& presentation) {
  ranks_.assign(packets_.size(), -1);
  order_.assign(packets_.size(), -1);
  shown_.clear();
  for (size_t i = 0; i < presentation.size(); ++i) {
    const int64_t ordinal = presentation[i];
    order_[static_cast<size_t>(ordinal)] = static_cast<int64_t>(i);
    if (packet(ordinal).discarded) continue;
    ranks_[static_cast<size_t>(ordinal)] = num_frames();
    shown_.push_back(ordinal);
  }

  reorder_depth_ = 0;
  std::vector<int64_t> later;  // places, of packets read so far, that some packet still to come goes before
  for (const int64_t place : order_) {
    if (place < 0) continue;
    const auto at = std::upper_bound(later.begin(), later.end(), place);
    reorder_depth_ = std::max<int>(reorder_depth_, static_cast<int>(later.end() - at));
    later.insert(at, place);
    if (later.size() > 32) later.erase(later.begin());
  }

  pts_.clear();
  bool from_packets = true;
  for (const int64_t ordinal : shown_) {
    const int64_t time = packet(ordinal).pts;
    if (time == kNoTime || (!pts_.empty() && time <= pts_.back())) from_packets = false;
    pts_.push_back(time);
  }
  if (!from_packets) {
    // A container without presentation times (AVI) counts packets. A decoder shows its first frame once it has read
    // `reorder_depth` packets more, and this is when, by that count, the frame is due.
    std::vector<int64_t> clock;
    for (const int64_t ordinal : shown_) {
      const IndexEntry& entry = packet(ordinal);
      clock.push_back(entry.dts != kNoTime ? entry.dts : entry.pts != kNoTime ? entry.pts : 0);
    }
    std::sort(clock.begin(), clock.end());
    const int64_t step = std::max<int64_t>(1, usual_duration_);
    for (size_t i = 0; i < pts_.size(); ++i) {
      const size_t due = i + static_cast<size_t>(reorder_depth_);
      int64_t time =
          due < clock.size() ? clock[due] : clock.back() + step * static_cast<int64_t>(due - clock.size() + 1);
      if (i > 0 && time <= pts_[i - 1]) time = pts_[i - 1] + step;
      pts_[i] = time;
    }
  }

  pts_seconds_.clear();
  durations_seconds_.clear();
  for (size_t i = 0; i < pts_.size(); ++i) {
    pts_seconds_.push_back(time_base_.seconds(pts_[i]));
    int64_t duration = i + 1 < pts_.size() ? pts_[i + 1] - pts_[i] : packet(shown_[i]).duration;
    if (duration <= 0) duration = i > 0 && usual_duration_ <= 0 ? pts_[i] - pts_[i - 1] : usual_duration_;
    durations_seconds_.push_back(time_base_.seconds(std::max<int64_t>(1, duration)));
  }
  key_ranks_.clear();
  for (const int64_t ordinal : entries_) {
    if (rank(ordinal) >= 0) key_ranks_.push_back(rank(ordinal));
  }
  std::sort(key_ranks_.begin(), key_ranks_.end());

  timeline_ = {};
  timeline_.key_frames = key_ranks_;
  for (const int64_t time : pts_) timeline_.starts.push_back(time_base_.seconds(time - pts_.front()));
  if (!pts_.empty()) timeline_.end = timeline_.starts.back() + durations_seconds_.back();
}

bool PacketIndex::is_entry(int64_t ordinal) const {
  const IndexEntry& entry = packet(ordinal);
  return entry.key && entry.facts.picture && entry.facts.entry != Entry::none;
}

int64_t PacketIndex::start_for(int64_t rank) const {
  const int64_t target = ordinal(rank);
  auto at = std::upper_bound(entries_.begin(), entries_.end(), target);
  while (at != entries_.begin()) {
    if (exact_from(*--at, target)) return *at;
  }
  return 0;
}

int64_t PacketIndex::entry_before(int64_t ordinal) const {
  const auto at = std::lower_bound(entries_.begin(), entries_.end(), ordinal);
  return at == entries_.begin() ? 0 : *(at - 1);
}

bool PacketIndex::disposable(const PacketFacts& facts) const {
  // A HEVC picture that its own temporal layer does not refer to may still serve higher layers.
  return facts.disposable && !packed_ && facts.temporal_layer == top_layer_;
}

bool PacketIndex::spoils(int64_t ordinal, int64_t rank) const {
  const int64_t target = this->ordinal(rank);
  if (ordinal == target) return true;
  if (ordinal > target || disposable(ordinal)) return false;
  const int64_t start = start_for(rank);
  if (ordinal < start) return false;
  // Pictures shown before an open entry that follow it in the file serve nothing shown after it.
  const int64_t place = order_[static_cast<size_t>(ordinal)];
  if (place >= 0) return place >= order_[static_cast<size_t>(start)];
  const int64_t time = packet(ordinal).pts;  // not shown: only its time can tell
  return time == kNoTime || packet(start).pts == kNoTime || time >= packet(start).pts;
}

bool PacketIndex::exact_from(int64_t start, int64_t ordinal) const {
  if (!is_entry(start) || ordinal < start) return false;
  return packet(start).facts.entry == Entry::clean ||
         order_[static_cast<size_t>(start)] <= order_[static_cast<size_t>(ordinal)];
}

bool PacketIndex::shown_after(int64_t rank, int64_t ordinal) const {
  return order_[static_cast<size_t>(this->ordinal(rank))] > order_[static_cast<size_t>(ordinal)];
}

int64_t PacketIndex::locate(int64_t position_bytes, int size_bytes) const {
  const auto at = std::lower_bound(positions_.begin(), positions_.end(), std::pair{position_bytes, int64_t{0}});
  if (at == positions_.end() || at->first != position_bytes) return -1;
  return packet(at->second).size_bytes == size_bytes ? at->second : -1;
}

}  // namespace pyvdl
