// What libavformat, libavcodec and libswscale alone need for a clip, on one thread: the limits that the bench compares
// decoders with. For files of the bench's corpus: 8-bit 4:2:0, constant frame rate.
//
// The file is read once and its packets are kept, so that nothing is paid for seeking. Decoded is every group of
// pictures that holds a wanted frame, up to its last wanted packet (limit a), without the pictures that no other
// picture needs unless they are wanted (limit b). Each wanted frame is cut before it is converted.
extern "C" {
#include <libavcodec/avcodec.h>
#include <libavformat/avformat.h>
#include <libavutil/opt.h>
#include <libswscale/swscale.h>
}

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

struct Free {
  void operator()(AVFormatContext* p) const { avformat_close_input(&p); }
  void operator()(AVCodecContext* p) const { avcodec_free_context(&p); }
  void operator()(AVPacket* p) const { av_packet_free(&p); }
  void operator()(AVFrame* p) const { av_frame_free(&p); }
  void operator()(AVCodecParserContext* p) const { av_parser_close(p); }
  void operator()(SwsContext* p) const { sws_freeContext(p); }
};
template <class T>
using Owner = std::unique_ptr<T, Free>;
using Packets = std::vector<Owner<AVPacket>>;

template <class T>
Owner<T> own(T* p) {
  if (!p) throw std::bad_alloc();
  return Owner<T>(p);
}

int check(int code, const char* what) {
  if (code >= 0) return code;
  char text[AV_ERROR_MAX_STRING_SIZE] = {};
  av_strerror(code, text, sizeof(text));
  throw std::runtime_error(std::string(what) + ": " + text);
}

// Runs the body; gives its error's text, or null.
template <class Body>
const char* guarded(Body body) {
  static thread_local std::string text;
  try {
    body();
    return nullptr;
  } catch (const std::exception& error) {
    text = error.what();
    return text.c_str();
  }
}

Owner<AVFormatContext> open(const char* path) {
  AVFormatContext* format = nullptr;
  check(avformat_open_input(&format, path, nullptr, nullptr), "open");
  return own(format);
}

// The stream that is decoded; the others are not read.
AVStream* video_stream(AVFormatContext* format) {
  const char* name = format->iformat->name;
  if (!std::strstr(name, "mov") && !std::strstr(name, "matroska")) {
    check(avformat_find_stream_info(format, nullptr), "stream info");
  }
  const int number = check(av_find_best_stream(format, AVMEDIA_TYPE_VIDEO, -1, -1, nullptr, 0), "stream");
  for (unsigned i = 0; i < format->nb_streams; ++i) format->streams[i]->discard = AVDISCARD_ALL;
  format->streams[number]->discard = AVDISCARD_DEFAULT;
  return format->streams[number];
}

Owner<AVCodecContext> open_decoder(const AVStream& stream) {
  const AVCodec* codec = avcodec_find_decoder(stream.codecpar->codec_id);
  if (!codec) throw std::runtime_error(std::string("no decoder for ") + avcodec_get_name(stream.codecpar->codec_id));
  auto decoder = own(avcodec_alloc_context3(codec));
  check(avcodec_parameters_to_context(decoder.get(), stream.codecpar), "parameters");
  decoder->thread_count = 1;
  check(avcodec_open2(decoder.get(), codec, nullptr), "decoder");
  return decoder;
}

Packets read_packets(AVFormatContext* format, int stream) {
  Packets packets;
  for (;;) {
    auto packet = own(av_packet_alloc());
    const int code = av_read_frame(format, packet.get());
    if (code == AVERROR_EOF) return packets;
    check(code, "read");
    if (packet->stream_index == stream) packets.push_back(std::move(packet));
  }
}

// Numbers of the packets in the order in which their frames are shown.
std::vector<size_t> display_order(const Packets& packets, AVCodecContext* decoder) {
  const bool timed =
      std::all_of(packets.begin(), packets.end(), [](const auto& p) { return p->pts != AV_NOPTS_VALUE; });
  std::vector<size_t> order;
  if (timed) {
    order.resize(packets.size());
    std::iota(order.begin(), order.end(), size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](size_t i, size_t j) { return packets[i]->pts < packets[j]->pts; });
    return order;
  }
  // AVI does not tell. With one picture of delay, B pictures are shown at once, each other one when the next is there.
  const auto parser = own(av_parser_init(decoder->codec_id));
  parser->flags |= PARSER_FLAG_COMPLETE_FRAMES;
  size_t held = packets.size();
  for (size_t i = 0; i < packets.size(); ++i) {
    uint8_t* data = nullptr;
    int size = 0;
    av_parser_parse2(parser.get(), decoder, &data, &size, packets[i]->data, packets[i]->size, AV_NOPTS_VALUE,
                     AV_NOPTS_VALUE, 0);
    if (parser->pict_type == AV_PICTURE_TYPE_B) {
      order.push_back(i);
      continue;
    }
    if (held < packets.size()) order.push_back(held);
    held = i;
  }
  order.push_back(held);
  return order;
}

// Packets that are decoded one after the other.
struct Run {
  size_t first;
  size_t last;
};

std::vector<Run> plan_runs(const Packets& packets, const std::vector<size_t>& order,
                           const std::vector<size_t>& wanted) {
  std::vector<size_t> rank(packets.size());
  for (size_t i = 0; i < order.size(); ++i) rank[order[i]] = i;
  const auto key_before = [&](size_t i) {
    while (i > 0 && !(packets[i]->flags & AV_PKT_FLAG_KEY)) --i;
    return i;
  };
  std::vector<Run> runs;
  for (const size_t packet : wanted) {
    size_t start = key_before(packet);
    // A picture shown before the key frame that it follows may need the group before.
    if (rank[packet] < rank[start] && start > 0) start = key_before(start - 1);
    if (runs.empty() || start > runs.back().last + 1) {
      runs.push_back({start, packet});
    } else {
      runs.back().last = std::max(runs.back().last, packet);
    }
  }
  return runs;
}

struct View {
  int resized_width;
  int resized_height;
  int size;  // of the square cut from the middle of the resized picture
};

// Along one side: the source pixels that become the target pixels. swscale cannot begin between two source pixels, so
// the target is larger than what is wanted by the few pixels that bring both ends close to whole ones.
struct Span {
  int source = 0, source_length = 0;
  int target = 0, target_length = 0;

  Span() = default;
  Span(int full, int resized, int size) {
    constexpr int kMargin = 3;
    const int begin = (resized - size) / 2;
    const double scale = static_cast<double>(full) / resized;
    const auto nearest = [&](int first, int last) {
      int best = first;
      const auto distance = [&](int i) { return std::abs(i * scale - std::round(i * scale)); };
      for (int i = first; i <= last; ++i) {
        if (distance(i) < distance(best)) best = i;
      }
      return best;
    };
    target = nearest(std::max(0, begin - kMargin), begin);
    target_length = nearest(begin + size, std::min(resized, begin + size + kMargin)) - target;
    source = static_cast<int>(std::lround(target * scale));
    source_length = static_cast<int>(std::lround((target + target_length) * scale)) - source;
  }
};

class Converter {
 public:
  explicit Converter(const View& view) : view_(view) {}

  // Writes uint8[size, size, 3]; reads hardly more than what becomes that.
  void convert(const AVFrame& frame, uint8_t* out) {
    if (!sws_) prepare(frame);
    const uint8_t* planes[4] = {frame.data[0] + y_.source * frame.linesize[0] + x_.source,
                                frame.data[1] + y_.source / 2 * frame.linesize[1] + x_.source / 2,
                                frame.data[2] + y_.source / 2 * frame.linesize[2] + x_.source / 2};
    uint8_t* const scaled = scaled_.data();
    check(sws_scale(sws_.get(), planes, frame.linesize, 0, y_.source_length, &scaled, &stride_), "scale");
    const int left = (view_.resized_width - view_.size) / 2 - x_.target;
    const int top = (view_.resized_height - view_.size) / 2 - y_.target;
    const int row = view_.size * kChannels;
    for (int i = 0; i < view_.size; ++i) {
      std::memcpy(out + i * row, scaled + (top + i) * stride_ + left * kChannels, static_cast<size_t>(row));
    }
  }

 private:
  static constexpr int kChannels = 3;

  void prepare(const AVFrame& frame) {
    if (frame.format != AV_PIX_FMT_YUV420P) throw std::runtime_error("frames are not yuv420p");
    x_ = Span(frame.width, view_.resized_width, view_.size);
    y_ = Span(frame.height, view_.resized_height, view_.size);
    stride_ = (x_.target_length * kChannels + 63) / 64 * 64;  // whole vectors are written
    scaled_.resize(static_cast<size_t>(stride_) * static_cast<size_t>(y_.target_length) + 64);
    sws_ = own(sws_alloc_context());
    set("srcw", x_.source_length);
    set("srch", y_.source_length);
    set("src_format", AV_PIX_FMT_YUV420P);
    set("dstw", x_.target_length);
    set("dsth", y_.target_length);
    set("dst_format", AV_PIX_FMT_RGB24);
    // Without full chroma, targets of even width come out two levels too dark.
    set("sws_flags", SWS_BILINEAR | SWS_FULL_CHR_H_INT);
    // Left siting, in 1/256 of a luma pixel; a cut at an odd place moves the chroma samples against it.
    set("src_h_chr_pos", -256 * (x_.source % 2));
    set("src_v_chr_pos", 128 - 256 * (y_.source % 2));
    const bool high_definition = frame.colorspace == AVCOL_SPC_UNSPECIFIED && frame.height > 576;
    const bool bt709 = frame.colorspace == AVCOL_SPC_BT709 || high_definition;
    constexpr int kOne = 1 << 16;
    sws_setColorspaceDetails(sws_.get(), sws_getCoefficients(bt709 ? SWS_CS_ITU709 : SWS_CS_ITU601),
                             frame.color_range == AVCOL_RANGE_JPEG, sws_getCoefficients(SWS_CS_DEFAULT), 1, 0, kOne,
                             kOne);
    check(sws_init_context(sws_.get(), nullptr, nullptr), "scaler");
  }

  void set(const char* name, int value) { check(av_opt_set_int(sws_.get(), name, value, 0), name); }

  const View view_;
  Owner<SwsContext> sws_;
  Span x_, y_;
  int stride_ = 0;
  std::vector<uint8_t> scaled_;
};

void decode_clip(const char* path, const std::vector<int64_t>& frames, const View& view, bool skip, uint8_t* out) {
  const auto format = open(path);
  const AVStream* stream = video_stream(format.get());
  const auto decoder = open_decoder(*stream);
  const Packets packets = read_packets(format.get(), stream->index);
  const std::vector<size_t> order = display_order(packets, decoder.get());

  std::vector<size_t> wanted;
  std::vector<uint8_t*> slots(packets.size(), nullptr);  // where the frame of a packet goes
  for (const int64_t number : frames) {
    wanted.push_back(order.at(static_cast<size_t>(number)));
    slots[wanted.back()] = out;
    out += static_cast<ptrdiff_t>(view.size) * view.size * 3;
  }

  Converter converter(view);
  const auto frame = own(av_frame_alloc());
  size_t missing = wanted.size();
  const auto send = [&](const AVPacket* packet) {
    check(avcodec_send_packet(decoder.get(), packet), "decode");
    for (;;) {
      const int code = avcodec_receive_frame(decoder.get(), frame.get());
      if (code == AVERROR(EAGAIN) || code == AVERROR_EOF) return;
      check(code, "decode");
      uint8_t* const slot = slots.at(static_cast<size_t>(frame->pts));
      if (!slot) continue;
      converter.convert(*frame, slot);
      --missing;
    }
  };
  for (const Run& run : plan_runs(packets, order, wanted)) {
    avcodec_flush_buffers(decoder.get());
    for (size_t i = run.first; i <= run.last; ++i) {
      decoder->skip_frame = skip && !slots[i] ? AVDISCARD_NONREF : AVDISCARD_DEFAULT;
      packets[i]->pts = static_cast<int64_t>(i);  // comes back on the frame
      packets[i]->dts = AV_NOPTS_VALUE;
      send(packets[i].get());
    }
    send(nullptr);
  }
  if (missing) throw std::runtime_error(std::to_string(missing) + " frames did not come out");
}

// Decodes all frames and does nothing with them.
int64_t decode_all(const char* path) {
  const auto format = open(path);
  const AVStream* stream = video_stream(format.get());
  const auto decoder = open_decoder(*stream);
  const auto packet = own(av_packet_alloc());
  const auto frame = own(av_frame_alloc());
  int64_t count = 0;
  for (bool more = true; more;) {
    av_packet_unref(packet.get());
    more = av_read_frame(format.get(), packet.get()) >= 0;
    if (more && packet->stream_index != stream->index) continue;
    check(avcodec_send_packet(decoder.get(), more ? packet.get() : nullptr), "decode");
    while (avcodec_receive_frame(decoder.get(), frame.get()) >= 0) ++count;
  }
  return count;
}

}  // namespace

extern "C" {

// Decodes the frames of these numbers (ascending, none twice) into uint8[num_frames, size, size, 3]. Gives the text of
// an error, or null.
const char* limit_clip(const char* path, const int64_t* frames, int num_frames, int resized_width, int resized_height,
                       int size, int skip, uint8_t* out) {
  return guarded(
      [&] { decode_clip(path, {frames, frames + num_frames}, {resized_width, resized_height, size}, skip != 0, out); });
}

// libavformat's own reading of a header; `opened` is to be closed.
const char* limit_open(const char* path, AVFormatContext** opened) {
  return guarded([&] { *opened = open(path).release(); });
}

void limit_close(AVFormatContext* opened) { avformat_close_input(&opened); }

const char* limit_decode(const char* path, int64_t* frames) {
  return guarded([&] { *frames = decode_all(path); });
}

const char* limit_ffmpeg() { return av_version_info(); }

}  // extern "C"
