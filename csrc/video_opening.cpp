// VideoDecoder's opening: streams, decoder, the index of the packets, and what there is to tell of the video.
#include <algorithm>
#include <cstring>
#include <utility>

#include "video_decoder.h"

namespace pyvdl {
namespace {

bool is_mp4_or_matroska(const AVFormatContext& format) {
  return container_is(format, "mov") || container_is(format, "matroska");
}

// mp4, mov, mkv and webm describe their streams in the header; for others FFmpeg must look into the packets.
bool header_suffices(const AVFormatContext& format) {
  if (!is_mp4_or_matroska(format)) return false;
  for (unsigned i = 0; i < format.nb_streams; ++i) {
    const AVCodecParameters& p = *format.streams[i]->codecpar;
    if (p.codec_type != AVMEDIA_TYPE_VIDEO) continue;
    const bool configured = p.codec_id != AV_CODEC_ID_H264 && p.codec_id != AV_CODEC_ID_HEVC;
    if (p.codec_id == AV_CODEC_ID_NONE || p.width <= 0 || (!configured && p.extradata_size < 7)) return false;
  }
  return format.nb_streams > 0;
}

// Containers whose packets do not each hold one whole shown picture with its time.
bool times_are_doubtful(const AVFormatContext& format, const AVCodecParameters& parameters) {
  const bool interlaced = parameters.field_order != AV_FIELD_UNKNOWN && parameters.field_order != AV_FIELD_PROGRESSIVE;
  if (interlaced && (parameters.codec_id == AV_CODEC_ID_H264 || parameters.codec_id == AV_CODEC_ID_HEVC)) return true;
  return !is_mp4_or_matroska(format) && !container_is(format, "flv");
}

constexpr int kWholeBytes = 64;       // packets up to this size are read: a picture may be missing in them
constexpr int kKeyFrameBytes = 4096;  // what is read of a key frame; its first slice tells what it is

IndexEntry entry_of(const AVPacket& packet) {
  IndexEntry entry;
  entry.pts = packet.pts;
  entry.dts = packet.dts;
  entry.position_bytes = packet.pos;
  entry.duration = packet.duration;
  entry.size_bytes = packet.size;
  entry.key = packet.flags & AV_PKT_FLAG_KEY;
  entry.discarded = packet.flags & AV_PKT_FLAG_DISCARD;
  return entry;
}

std::string name_or_unknown(const char* name) { return name ? name : "unknown"; }

}  // namespace

VideoDecoder::VideoDecoder(const Source& source, const DecoderOptions& options, const Deadline& deadline,
                           std::shared_ptr<const StreamIndex> known)
    : source_(source), options_(options), deadline_(deadline), index_(std::move(known)) {
  open_input();
  if (!index_) make_index();
  if (index_->from_tables) inspector_ = inspector();
  state_.assign(static_cast<size_t>(index().num_packets()), 0);
  open_codec(index().reorder_depth(), true);
  if (index().num_frames() == 0) throw Error("decode", "no frame can be decoded");
  const Limits& limits = options_.limits;
  const double seconds = index().timeline().end;
  if (seconds > limits.max_seconds) {
    throw Error("limits", std::to_string(seconds) + " s exceed max_seconds = " + std::to_string(limits.max_seconds));
  }
  if (index().num_packets() > limits.max_frames) refuse_length();
}

void VideoDecoder::refuse_length() const {
  throw Error("limits", "more than max_frames = " + std::to_string(options_.limits.max_frames) + " packets");
}

void VideoDecoder::make_index() {
  std::optional<StreamIndex> tables;
  if (may_read_tables()) tables = read_tables();
  if (tables) {
    index_ = std::make_shared<StreamIndex>(*std::move(tables));
    return;
  }
  if (next_packet_ != 0) open_input();
  auto made = std::make_shared<StreamIndex>(scan_packets());
  PacketIndex& packets = made->packets;
  index_ = made;
  state_.assign(static_cast<size_t>(packets.num_packets()), 0);
  const AVCodecID codec = stream_->codecpar->codec_id;
  if (!packets.complete() || times_are_doubtful(*input_->format(), *stream_->codecpar)) {
    packets.set_order(find_order());
  } else if (packets.starts_undecodable()) {
    if (codec == AV_CODEC_ID_H264 || codec == AV_CODEC_ID_HEVC) {
      packets.leave_out_undecodable_start();
    } else {
      packets.set_order(decode_order());  // the packets do not tell which of these pictures need others
    }
  }
}

void VideoDecoder::open_input() {
  input_.reset();  // where opening fails, the next call of decode() tries again
  auto input = std::make_unique<Input>(source_, options_.limits.max_bytes, deadline_);
  AVFormatContext* format = input->format();
  if (!header_suffices(*format)) {
    const int code = avformat_find_stream_info(format, nullptr);
    input->require();
    check(code, "header", "stream parameters");
  }
  std::vector<AVStream*> videos;
  for (unsigned i = 0; i < format->nb_streams; ++i) {
    AVStream* stream = format->streams[i];
    stream->discard = AVDISCARD_ALL;
    const bool cover = stream->disposition & AV_DISPOSITION_ATTACHED_PIC;
    if (stream->codecpar->codec_type == AVMEDIA_TYPE_VIDEO && !cover) videos.push_back(stream);
  }
  num_video_streams_ = static_cast<int>(videos.size());
  const int wanted = options_.stream.value_or(0);
  if (videos.empty()) throw Error("stream", "no video stream");
  if (wanted < 0 || wanted >= num_video_streams_) {
    throw Error("stream",
                "no video stream " + std::to_string(wanted) + ", there are " + std::to_string(num_video_streams_));
  }
  stream_ = videos[static_cast<size_t>(wanted)];
  stream_->discard = AVDISCARD_DEFAULT;
  const AVCodecID codec = stream_->codecpar->codec_id;
  if (is_mp4_or_matroska(*format) && (codec == AV_CODEC_ID_H264 || codec == AV_CODEC_ID_HEVC)) {
    format->flags |= AVFMT_FLAG_NOPARSE;  // PacketInspector finds the entries, at a fraction of the parser's time
  }
  orientation_ = orientation_of(*stream_);
  const int64_t pixels = static_cast<int64_t>(stream_->codecpar->width) * stream_->codecpar->height;
  if (pixels > options_.limits.max_pixels) {
    throw Error("limits", std::to_string(stream_->codecpar->width) + "x" + std::to_string(stream_->codecpar->height) +
                              " exceeds max_pixels = " + std::to_string(options_.limits.max_pixels));
  }
  input_ = std::move(input);
  next_packet_ = 0;
  held_ = false;
}

// `unrecovered`: give also frames that the decoder takes for damaged because it started at an open entry.
void VideoDecoder::open_codec(int reorder_depth, bool unrecovered) {
  const AVCodec* codec = avcodec_find_decoder(stream_->codecpar->codec_id);
  if (!codec) {
    throw Error("codec", std::string("no decoder for ") + avcodec_get_name(stream_->codecpar->codec_id));
  }
  codec_.reset(avcodec_alloc_context3(codec));
  if (!codec_) throw std::bad_alloc();
  check(avcodec_parameters_to_context(codec_.get(), stream_->codecpar), "codec", "parameters");
  codec_->thread_count = 1;
  codec_->pkt_timebase = stream_->time_base;
  codec_->max_pixels = options_.limits.max_pixels;
  if (unrecovered) codec_->flags |= AV_CODEC_FLAG_OUTPUT_CORRUPT;
  codec_->has_b_frames = std::max(codec_->has_b_frames, reorder_depth);
  check(avcodec_open2(codec_.get(), codec, nullptr), "codec", codec->name);
  if (!index_->encoder_notes.empty()) {
    av_packet_unref(packet_.get());
    check(av_new_packet(packet_.get(), static_cast<int>(index_->encoder_notes.size())), "codec", "packet");
    std::memcpy(packet_->data, index_->encoder_notes.data(), index_->encoder_notes.size());
    codec_->skip_frame = AVDISCARD_NONREF;  // no complaint that there is no picture
    avcodec_send_packet(codec_.get(), packet_.get());
    avcodec_flush_buffers(codec_.get());
    codec_->skip_frame = AVDISCARD_DEFAULT;
    take_log();
  }
  run_next_ = -1;
}

StreamIndex VideoDecoder::scan_packets() {
  StreamIndex made;
  const AVCodecID codec = stream_->codecpar->codec_id;
  const PacketInspector inspector = this->inspector();
  std::vector<IndexEntry> packets;
  if (codec == AV_CODEC_ID_AV1) made.references.emplace();
  int code = 0;
  for (;;) {
    deadline_.require();
    av_packet_unref(packet_.get());
    if ((code = av_read_frame(input_->format(), packet_.get())) < 0) break;
    if (packet_->stream_index != stream_->index) continue;
    IndexEntry entry = entry_of(*packet_);
    entry.facts = inspector.inspect({packet_->data, static_cast<size_t>(packet_->size)});
    entry.key |= entry.facts.entry != Entry::none && (codec == AV_CODEC_ID_H264 || codec == AV_CODEC_ID_HEVC);
    const bool incomplete = packet_->flags & AV_PKT_FLAG_CORRUPT;
    entry.facts.damaged |= incomplete;
    made.truncated |= incomplete && container_is(*input_->format(), "mov");  // there it tells that the file ends
    if (made.references) made.references->add({packet_->data, static_cast<size_t>(packet_->size)});
    if (packets.empty())
      made.encoder_notes = inspector.encoder_notes({packet_->data, static_cast<size_t>(packet_->size)});
    packets.push_back(entry);
    if (static_cast<int64_t>(packets.size()) > options_.limits.max_frames) refuse_length();
  }
  input_->require();
  stats_.packets_read += static_cast<int64_t>(packets.size());
  made.truncated |= code != AVERROR_EOF;
  if (container_is(*input_->format(), "mov")) {
    made.truncated |= avformat_index_get_entries_count(stream_) > static_cast<int>(packets.size());
  }
  if (packets.empty()) throw Error("read", "the video stream has no packets");
  if (made.references && !made.references->known()) made.references.reset();
  finish(made, std::move(packets));
  return made;
}

// What is decided by the container alone, before its packets are read.
bool VideoDecoder::may_read_tables() const {
  if (!container_is(*input_->format(), "mov") || times_are_doubtful(*input_->format(), *stream_->codecpar))
    return false;
  if (!inspector().judges_singly()) return false;
  int64_t bytes = 0;
  for (int i = 0; i < avformat_index_get_entries_count(stream_); ++i) {
    bytes += avformat_index_get_entry(stream_, i)->size;
  }
  return bytes > options_.read_whole_bytes;
}

// Without reading the samples of a mp4: of a film of gigabytes, that is the difference between seconds and
// milliseconds. Nothing where the packets have to be read after all.
std::optional<StreamIndex> VideoDecoder::read_tables() {
  const PacketInspector inspector = this->inspector();
  const int listed = avformat_index_get_entries_count(stream_);
  std::vector<Unread> places;
  for (int i = 1; i < listed; ++i) {  // the first packet holds the encoder's notes
    const AVIndexEntry& sample = *avformat_index_get_entry(stream_, i);
    const int wanted = sample.flags & AVINDEX_KEYFRAME ? kKeyFrameBytes : 0;
    if (sample.size > std::max(kWholeBytes, wanted)) places.push_back({sample.pos, sample.size, wanted});
  }
  std::sort(places.begin(), places.end(), [](const Unread& a, const Unread& b) { return a.position < b.position; });
  input_->leave_unread(std::move(places));

  StreamIndex made;
  made.from_tables = true;
  std::vector<IndexEntry> packets;
  int code = 0;
  bool plain = true;
  next_packet_ = -1;
  while (plain) {
    deadline_.require();
    av_packet_unref(packet_.get());
    if ((code = av_read_frame(input_->format(), packet_.get())) < 0) break;
    if (packet_->stream_index != stream_->index) continue;
    IndexEntry entry = entry_of(*packet_);
    const auto size = static_cast<size_t>(packet_->size);
    const bool whole = packets.empty() || packet_->size <= kWholeBytes;
    entry.facts.entry = Entry::none;
    if (whole || entry.key) {
      const size_t known = whole ? size : std::min<size_t>(size, kKeyFrameBytes);
      entry.facts = inspector.inspect({packet_->data, known}, size);
      // The rest is left to the decoding of this packet: what it says depends on how much of it was at hand.
      plain &= entry.facts.picture && !entry.facts.damaged;
      if (!entry.key) entry.facts = {.entry = Entry::none};
    }
    plain &= !(packet_->flags & AV_PKT_FLAG_CORRUPT);
    if (packets.empty()) {
      plain &= entry.key && entry.facts.entry == Entry::clean;
      made.encoder_notes = inspector.encoder_notes({packet_->data, size});
    }
    packets.push_back(entry);
    if (static_cast<int64_t>(packets.size()) > options_.limits.max_frames) refuse_length();
  }
  input_->require();
  input_->leave_unread({});
  if (!plain || code != AVERROR_EOF || static_cast<int>(packets.size()) < listed) return std::nullopt;
  finish(made, std::move(packets));
  if (!made.packets.complete()) return std::nullopt;
  return made;
}

// The packets are not what the tables made of them: reads them all.
void VideoDecoder::replace_tables() {
  open_input();
  const int64_t frames = index().num_frames();
  auto made = std::make_shared<StreamIndex>(scan_packets());
  if (made->packets.num_frames() != frames || !made->packets.complete() || made->packets.starts_undecodable()) {
    throw Error("decode", "the container's tables and its packets contradict each other");
  }
  tables_ = std::exchange(index_, std::move(made));
  state_.assign(static_cast<size_t>(index().num_packets()), 0);
  inspector_.reset();
}

PacketInspector VideoDecoder::inspector() const {
  const AVCodecParameters& parameters = *stream_->codecpar;
  return {parameters.codec_id, {parameters.extradata, static_cast<size_t>(std::max(0, parameters.extradata_size))}};
}

void VideoDecoder::finish(StreamIndex& made, std::vector<IndexEntry> packets) {
  AVRational rate = stream_->avg_frame_rate.num > 0 ? stream_->avg_frame_rate : stream_->r_frame_rate;
  int64_t usual_duration = 0;
  if (rate.num > 0 && rate.den > 0) usual_duration = av_rescale_q(1, av_inv_q(rate), stream_->time_base);
  made.packets = PacketIndex(std::move(packets), {stream_->time_base.num, stream_->time_base.den}, usual_duration);
  next_packet_ = -1;
}

// Which packets become frames, and in which order, where presentation times do not tell.
std::vector<int64_t> VideoDecoder::find_order() {
  const AVCodecDescriptor* codec = avcodec_descriptor_get(stream_->codecpar->codec_id);
  if (codec && (codec->props & AV_CODEC_PROP_INTRA_ONLY)) return index().stored_order();
  if (stream_->codecpar->codec_id == AV_CODEC_ID_MPEG4) {
    if (std::optional<std::vector<int64_t>> output = index().order_by_type()) return *std::move(output);
  }
  return decode_order();
}

// Learns it by decoding the whole stream.
std::vector<int64_t> VideoDecoder::decode_order() {
  open_codec(0, false);
  std::vector<int64_t> output;
  const auto collect = [&] {
    for (;;) {
      deadline_.require();
      const int code = avcodec_receive_frame(codec_.get(), frame_.get());
      if (code == AVERROR(EAGAIN) || code == AVERROR_EOF) return;
      if (code < 0) continue;
      const int64_t token = frame_->pts;
      ++stats_.frames_decoded;
      if (token < 0 || token >= index().num_packets() || state_[static_cast<size_t>(token)]) continue;
      state_[static_cast<size_t>(token)] = 1;
      output.push_back(token);
    }
  };
  position(0);
  for (int64_t ordinal; (ordinal = read_packet()) >= 0;) {
    packet_->pts = ordinal;
    packet_->dts = AV_NOPTS_VALUE;
    packet_->flags &= ~AV_PKT_FLAG_DISCARD;
    ++stats_.packets_sent;
    while (avcodec_send_packet(codec_.get(), packet_.get()) == AVERROR(EAGAIN)) collect();
    collect();
  }
  avcodec_send_packet(codec_.get(), nullptr);
  collect();
  take_log();
  std::fill(state_.begin(), state_.end(), 0);
  return output;
}

Metadata VideoDecoder::metadata() {
  if (metadata_) return *metadata_;
  Metadata m;
  int width = codec_->width, height = codec_->height, format = codec_->pix_fmt;
  AVColorSpace space = codec_->colorspace;
  AVColorRange range = codec_->color_range;
  try {  // the first frame knows better than the header
    const int64_t first[1] = {0};
    decode(first, [&](int64_t, const AVFrame& frame) {
      width = frame.width, height = frame.height, format = frame.format;
      space = frame.colorspace, range = frame.color_range;
    });
    last_asked_ = -1;
  } catch (const Error& error) {
    if (error.stage() != "decode") throw;
  }
  const Timeline timeline = index().timeline();
  m.num_frames = index().num_frames();
  m.width = upright_width(width, height, orientation_);
  m.height = upright_height(width, height, orientation_);
  m.fps = static_cast<double>(m.num_frames) / timeline.end;
  m.duration_seconds = timeline.end;
  m.start_seconds = index().pts_seconds().front();
  m.codec = avcodec_get_name(codec_->codec_id);
  m.pixel_format = name_or_unknown(av_get_pix_fmt_name(static_cast<AVPixelFormat>(format)));
  m.rotation = orientation_.degrees;
  m.color_space = name_or_unknown(av_color_space_name(space));
  m.color_range =
      color_rule(width, height, space, range, static_cast<AVPixelFormat>(format)).full_range ? "full" : "limited";
  m.time_base = {stream_->time_base.num, stream_->time_base.den};
  m.stream_index = stream_->index;
  m.num_video_streams = num_video_streams_;
  m.reorder_depth = index().reorder_depth();
  m.container = input_->format()->iformat->name;
  m.truncated = truncated();
  metadata_ = m;
  return m;
}

}  // namespace pyvdl
