#include "video_decoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

namespace pyvdl {
namespace {

constexpr int64_t kSkipPackets = 8;     // reading so few packets and forgetting them is cheaper than a seek
constexpr int kLocatePackets = 256;     // packets read after a seek to find out where it went
constexpr int64_t kConcealFrames = 64;  // frames tried in place of one that does not come out

struct Contradiction {};  // a packet is not what the container's tables made of it

}  // namespace

void VideoDecoder::set_deadline(const Deadline& deadline) {
  deadline_ = deadline;
  if (input_) input_->set_deadline(deadline);
}

int64_t VideoDecoder::read_packet() {
  if (std::exchange(held_, false)) return next_packet_++;
  for (;;) {
    deadline_.require();
    av_packet_unref(packet_.get());
    if (av_read_frame(input_->format(), packet_.get()) < 0) {
      input_->require();
      return -1;
    }
    if (packet_->stream_index != stream_->index) continue;
    ++stats_.packets_read;
    if (next_packet_ < 0) {
      const int64_t found = index().locate(packet_->pos, packet_->size);
      if (found < 0) return -1;
      next_packet_ = found;
    }
    if (next_packet_ >= index().num_packets()) return -1;
    return next_packet_++;
  }
}

bool VideoDecoder::seek_near(int64_t ordinal) {
  const IndexEntry& entry = index().packet(ordinal);
  if (index().locate(entry.position_bytes, entry.size_bytes) < 0) return false;
  ++stats_.seeks;
  held_ = false;
  AVFormatContext* format = input_->format();
  // Matroska's cues hold presentation times; the transport and program streams have no index, but packets can be
  // found again by their place; the tables of the others hold decoding times.
  const bool by_place = (format->iformat->flags & AVFMT_TS_DISCONT) != 0;
  int64_t time = container_is(*format, "matroska") || entry.dts == kNoTime ? entry.pts : entry.dts;
  if (by_place) time = entry.position_bytes;
  if (time == kNoTime) return false;
  const int flags = AVSEEK_FLAG_BACKWARD | (by_place ? AVSEEK_FLAG_BYTE : 0);
  if (av_seek_frame(format, stream_->index, time, flags) < 0) return false;
  next_packet_ = -1;
  int64_t found = -1;
  for (int i = 0; i < kLocatePackets && found < 0; ++i) {
    found = read_packet();
    if (found < 0 && next_packet_ < 0 && !packet_->data) return false;  // end of file
  }
  if (found < 0 || found > ordinal) return false;
  held_ = true;
  next_packet_ = found;
  return true;
}

void VideoDecoder::position(int64_t ordinal) {
  const bool near = next_packet_ >= 0 && next_packet_ <= ordinal && ordinal - next_packet_ <= kSkipPackets;
  if (!near && !seek_near(ordinal)) open_input();  // from the start, by counting
  while (next_packet_ != ordinal) {
    if (read_packet() < 0) throw Error("read", "packet " + std::to_string(ordinal) + " cannot be reached");
  }
}

void VideoDecoder::decode(std::span<const int64_t> ranks, const Sink& sink) {
  if (ranks.empty()) return;
  const bool contiguous = ranks.back() - ranks.front() + 1 == static_cast<int64_t>(ranks.size());
  follow_ = contiguous && last_asked_ >= 0 && ranks.front() == last_asked_ + 1;
  last_asked_ = ranks.back();
  try {
    if (!input_) open_input();
    try {
      run_groups(ranks, sink);
    } catch (const Contradiction&) {
      replace_tables();
      run_next_ = -1;
      run_groups(ranks, sink);
    }
  } catch (...) {
    run_next_ = -1;  // the decoder's state is unknown
    last_asked_ = -1;
    if (input_ && input_->failed()) input_.reset();
    throw;
  }
}

void VideoDecoder::run_groups(std::span<const int64_t> ranks, const Sink& sink) {
  for (int64_t good = 0; !ranks.empty();) {
    const Group group = next_group(ranks);
    run_group(group, good, sink);
    good += static_cast<int64_t>(group.ranks.size());
    ranks = ranks.subspan(group.ranks.size());
  }
}

VideoDecoder::Group VideoDecoder::next_group(std::span<const int64_t> ranks) const {
  Group group{ranks.first(1), index().start_for(ranks[0]), index().ordinal(ranks[0])};
  for (size_t i = 1; i < ranks.size(); ++i) {
    const int64_t start = index().start_for(ranks[i]);
    if (start > group.last + 1 || start < group.start) break;
    group.last = std::max(group.last, index().ordinal(ranks[i]));
    group.ranks = ranks.first(i + 1);
  }
  return group;
}

bool VideoDecoder::resumable(const Group& group) const {
  if (run_next_ < 0 || run_start_ > group.start || group.start > run_next_) return false;
  if (references()) {
    const Av1References::Marks needed = needed_by(group);
    const size_t last = run_next_ < index().num_packets() ? references()->frames_of(run_next_).first : needed.size();
    for (size_t frame = references()->frames_of(run_start_).first; frame < last; ++frame) {
      if (needed[frame] && !given_[frame]) return false;
    }
  }
  return std::all_of(group.ranks.begin(), group.ranks.end(), [&](int64_t rank) {
    const int64_t ordinal = index().ordinal(rank);
    const uint8_t state = state_[static_cast<size_t>(ordinal)];
    return ordinal >= run_next_ || ((state & kGiven) && !(state & kOut));
  });
}

Av1References::Marks VideoDecoder::needed_by(const Group& group) const {
  if (follow_) return Av1References::Marks(references()->num_frames(), 1);
  std::vector<int64_t> ordinals;
  for (const int64_t rank : group.ranks) ordinals.push_back(index().ordinal(rank));
  return references()->needed(ordinals);
}

// `good`: wanted frames that came out before this group, for the error's text.
void VideoDecoder::run_group(const Group& group, int64_t good, const Sink& sink) {
  int64_t start = group.start;
  attempt(group, resumable(group) ? -1 : start, sink);
  // A wanted frame that stays away although decoding began at an entry that may be too late: begin earlier.
  for (int tries = 0; outstanding_ > 0 && start > 0 && tries < 2; ++tries) {
    start = tries == 0 ? index().entry_before(start) : 0;
    attempt(group, start, sink);
  }
  if (options_.conceal) {
    if (outstanding_ > 0) conceal_missing(group, sink);
    return;
  }
  for (const int64_t rank : group.ranks) {
    if (const std::string fault = fault_of(rank); !fault.empty()) {
      throw Error("decode", fault + " (wanted frames before it that are good: " + std::to_string(good) + ")");
    }
    ++good;
  }
}

// Decodes the group from packet `start`, or goes on with the present run when `start` is -1.
void VideoDecoder::attempt(const Group& group, int64_t start, const Sink& sink) {
  first_wanted_ = group.ranks.front();
  outstanding_ = static_cast<int64_t>(group.ranks.size());
  if (start >= 0) start_run(start);
  if (references()) needed_ = needed_by(group);
  // What is left unfiltered shows in all that refers to it. Where every picture does (no B pictures to leave out), or
  // the filter is strong (HEVC), a third of the group goes through it, which keeps the error about half as large.
  unfiltered_from_ = group.start;
  const bool disposables = index_->from_tables ? index().reorder_depth() > 0 : index().any_disposable();
  if (codec_->codec_id == AV_CODEC_ID_HEVC || !disposables) {
    unfiltered_from_ += (group.last - group.start) / 3;
  }
  for (const int64_t rank : group.ranks) state_[static_cast<size_t>(index().ordinal(rank))] |= kWanted;
  if (start < 0) receive(sink);
  bool ended = draining_;
  while (!ended && outstanding_ > 0 && (run_next_ <= group.last || follow_)) {
    const int64_t ordinal = read_packet();
    if (ordinal < 0) {
      ended = true;
      break;
    }
    run_next_ = ordinal + 1;
    feed(ordinal, sink);
    // The flags of a damaged frame are seen only when it comes out, which may be after frames that refer to it.
    if (follow_ && has_log()) follow_ = false;
  }
  if (!draining_ && (outstanding_ > 0 || !follow_ || ended)) {
    draining_ = true;
    send(nullptr, sink);
  }
  if (draining_ && (outstanding_ > 0 || !follow_)) run_next_ = -1;  // nothing is left in the decoder
  for (const int64_t rank : group.ranks) state_[static_cast<size_t>(index().ordinal(rank))] &= ~kWanted;
}

void VideoDecoder::start_run(int64_t start) {
  avcodec_flush_buffers(codec_.get());
  std::fill(state_.begin(), state_.end(), 0);
  if (references()) given_.assign(references()->num_frames(), 0);
  errors_.clear();
  error_text_.clear();
  take_log();
  position(start);
  run_start_ = start;
  run_next_ = start;
  draining_ = false;
}

void VideoDecoder::feed(int64_t ordinal, const Sink& sink) {
  uint8_t& state = state_[static_cast<size_t>(ordinal)];
  PacketFacts facts = index().packet(ordinal).facts;
  if (inspector_) {
    facts = inspector_->inspect({packet_->data, static_cast<size_t>(packet_->size)});
    if ((!facts.picture && !facts.damaged) || facts.temporal_layer > 0) throw Contradiction();
  }
  if (index().disposable(facts)) state |= kDisposable;
  if (facts.damaged) note_error(ordinal, AVERROR_INVALIDDATA, "NAL unit size beyond the packet, or a corrupt packet");
  const bool wanted = (state & kWanted) || (follow_ && index().rank(ordinal) >= first_wanted_);
  if (!wanted && (state & kDisposable)) return;
  // Not by AVCodecContext::skip_frame: told to skip, decoders keep silent about reference pictures they cannot decode.
  if (references() && !leave_out_unneeded(ordinal)) return;
  const std::optional<size_t> shown = references() ? references()->shown_by(ordinal) : std::nullopt;
  if (!references() || (shown && needed_[*shown])) state |= kGiven;
  const bool unfiltered = options_.fast && !wanted && ordinal >= unfiltered_from_;
  codec_->skip_loop_filter = unfiltered ? AVDISCARD_ALL : AVDISCARD_DEFAULT;
  packet_->pts = ordinal;  // comes back on the frame and names it
  packet_->dts = AV_NOPTS_VALUE;
  packet_->flags &= ~AV_PKT_FLAG_DISCARD;
  ++stats_.packets_sent;
  send(packet_.get(), sink);
}

// Cuts the coded frames that no wanted frame needs out of packet_; false: nothing is left of it.
bool VideoDecoder::leave_out_unneeded(int64_t ordinal) {
  const auto [first, last] = references()->frames_of(ordinal);
  size_t kept = 0;
  for (size_t frame = first; frame < last; ++frame) {
    if (!needed_[frame]) continue;
    given_[frame] = 1;
    ++kept;
  }
  if (kept == last - first) return kept > 0;
  if (kept == 0) return false;
  if (packet_->size != index().packet(ordinal).size_bytes) {
    throw Error("read",
                "packet " + std::to_string(ordinal) + " is not the one that was there when the file was opened");
  }
  check(av_packet_make_writable(packet_.get()), "decode", "packet");
  auto size = static_cast<size_t>(packet_->size);
  for (size_t frame = last; frame-- > first;) {
    if (needed_[frame]) continue;
    const auto [begin, end] = references()->bytes_of(frame);
    std::memmove(packet_->data + begin, packet_->data + end, size - end);
    size -= end - begin;
  }
  av_shrink_packet(packet_.get(), static_cast<int>(size));
  return true;
}

// Gives the decoder a packet, or tells it with null that no more will come, and takes the frames it has ready.
void VideoDecoder::send(const AVPacket* packet, const Sink& sink) {
  int code = avcodec_send_packet(codec_.get(), packet);
  while (code == AVERROR(EAGAIN)) {
    const int64_t before = stats_.frames_decoded;
    receive(sink);
    code = avcodec_send_packet(codec_.get(), packet);
    if (stats_.frames_decoded == before && code == AVERROR(EAGAIN)) throw Error("decode", "the decoder is stuck");
  }
  if (code < 0 && code != AVERROR_EOF) note_error(std::max<int64_t>(0, run_next_ - 1), code);
  receive(sink);
}

void VideoDecoder::receive(const Sink& sink) {
  // Frames behind the last wanted one are still looked at for errors, unless they will be asked for next.
  while (outstanding_ > 0 || !follow_) {
    deadline_.require();
    const int code = avcodec_receive_frame(codec_.get(), frame_.get());
    if (code == AVERROR(EAGAIN) || code == AVERROR_EOF) return;
    if (code < 0) {
      note_error(std::max<int64_t>(0, run_next_ - 1), code);
      continue;
    }
    ++stats_.frames_decoded;
    const int64_t ordinal = frame_->pts;
    if (ordinal < 0 || ordinal >= index().num_packets()) continue;
    // The H.264 decoder marks good frames too, when pictures shown before its open entry come between; the index knows.
    const bool unproven = codec_->codec_id != AV_CODEC_ID_H264 || !index().exact_from(run_start_, ordinal);
    const bool corrupt = (frame_->flags & AV_FRAME_FLAG_CORRUPT) && unproven;
    if (frame_->decode_error_flags || corrupt) note_error(ordinal, AVERROR_INVALIDDATA);
    uint8_t& state = state_[static_cast<size_t>(ordinal)];
    const bool deliver = (state & kWanted) && !(state & kOut);
    state |= kOut;
    if (!deliver) continue;
    --outstanding_;
    sink(index().rank(ordinal), *frame_);
  }
}

void VideoDecoder::note_error(int64_t ordinal, int code, const char* cause) {
  errors_.push_back(ordinal);
  if (!error_text_.empty()) return;
  error_text_ = cause ? cause : take_log();
  if (error_text_.empty()) {
    char text[AV_ERROR_MAX_STRING_SIZE] = {};
    av_strerror(code, text, sizeof(text));
    error_text_ = text;
  }
}

bool VideoDecoder::spoils(int64_t ordinal, int64_t rank) const {
  const bool alone = (state_[static_cast<size_t>(ordinal)] & kDisposable) && ordinal != index().ordinal(rank);
  return !alone && index().spoils(ordinal, rank);
}

std::string VideoDecoder::fault_of(int64_t rank) const {
  const std::string name = "frame " + std::to_string(rank);
  for (const int64_t ordinal : errors_) {
    if (spoils(ordinal, rank)) return name + " was decoded with errors: " + error_text_;
  }
  const int64_t target = index().ordinal(rank);
  if (!(state_[static_cast<size_t>(target)] & kOut)) return name + " did not come out of the decoder";
  const bool drained = run_next_ < 0;
  for (int64_t ordinal = index().start_for(rank); ordinal < target; ++ordinal) {
    const uint8_t state = state_[static_cast<size_t>(ordinal)];
    if (!(state & kGiven) || (state & kOut) || index().rank(ordinal) < 0 || !spoils(ordinal, rank)) continue;
    if (drained || index().shown_after(rank, ordinal)) {
      return name + " was decoded without frame " + std::to_string(index().rank(ordinal)) + ", which did not come out";
    }
  }
  return {};
}

// Puts the nearest frame before it, else after it, in the place of each frame that never came out.
void VideoDecoder::conceal_missing(const Group& group, const Sink& sink) {
  std::vector<int64_t> missing;
  for (const int64_t rank : group.ranks) {
    if (!(state_[static_cast<size_t>(index().ordinal(rank))] & kOut)) missing.push_back(rank);
  }
  for (const int64_t rank : missing) {
    bool found = false;
    const Sink stand_in = [&](int64_t, const AVFrame& frame) {
      found = true;
      sink(rank, frame);
    };
    for (int64_t step = 1; step <= kConcealFrames && !found; ++step) {
      for (const int64_t near : {rank - step, rank + step}) {
        if (found || near < 0 || near >= index().num_frames()) continue;
        const int64_t ranks[1] = {near};
        const Group single = next_group(ranks);
        attempt(single, single.start, stand_in);
      }
    }
    if (!found) throw Error("decode", "frame " + std::to_string(rank) + " and its neighbours did not come out");
  }
}

}  // namespace pyvdl
