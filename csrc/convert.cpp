#include "convert.h"

#include <algorithm>
#include <cstddef>
#include <cstring>

namespace pyvdl {
namespace {

constexpr size_t kMaxScalers = 4;
constexpr ptrdiff_t kChannels = 3;

// The yuvj formats are the plain ones with full range.
AVPixelFormat plain_format(AVPixelFormat format) {
  switch (format) {
    case AV_PIX_FMT_YUVJ420P:
      return AV_PIX_FMT_YUV420P;
    case AV_PIX_FMT_YUVJ422P:
      return AV_PIX_FMT_YUV422P;
    case AV_PIX_FMT_YUVJ444P:
      return AV_PIX_FMT_YUV444P;
    case AV_PIX_FMT_YUVJ440P:
      return AV_PIX_FMT_YUV440P;
    case AV_PIX_FMT_YUVJ411P:
      return AV_PIX_FMT_YUV411P;
    default:
      return format;
  }
}

// Where chroma samples stand, in 1/256 of a luma pixel; unknown means left, as in MPEG-2, H.264 and HEVC.
std::pair<int, int> chroma_position(AVChromaLocation location) {
  switch (location) {
    case AVCHROMA_LOC_CENTER:
      return {128, 128};
    case AVCHROMA_LOC_TOPLEFT:
      return {0, 0};
    case AVCHROMA_LOC_TOP:
      return {128, 0};
    case AVCHROMA_LOC_BOTTOMLEFT:
      return {0, 256};
    case AVCHROMA_LOC_BOTTOM:
      return {128, 256};
    default:
      return {0, 128};
  }
}

void set(SwsContext* sws, const char* name, int64_t value) {
  check(av_opt_set_int(sws, name, value, 0), "convert", std::string("scaler option ") + name);
}

}  // namespace

ColorRule color_rule(int width, int height, AVColorSpace space, AVColorRange range, AVPixelFormat format) {
  ColorRule rule;
  switch (space) {
    case AVCOL_SPC_BT709:
    case AVCOL_SPC_BT470BG:
    case AVCOL_SPC_SMPTE170M:
    case AVCOL_SPC_FCC:
    case AVCOL_SPC_SMPTE240M:
    case AVCOL_SPC_BT2020_NCL:
    case AVCOL_SPC_BT2020_CL:
      break;
    default:
      space = width >= 1280 || height > 576 ? AVCOL_SPC_BT709 : AVCOL_SPC_SMPTE170M;
  }
  switch (space) {
    case AVCOL_SPC_BT709:
      rule = {.matrix = SWS_CS_ITU709, .kr = 0.2126, .kb = 0.0722};
      break;
    case AVCOL_SPC_FCC:
      rule = {.matrix = SWS_CS_FCC, .kr = 0.30, .kb = 0.11};
      break;
    case AVCOL_SPC_SMPTE240M:
      rule = {.matrix = SWS_CS_SMPTE240M, .kr = 0.212, .kb = 0.087};
      break;
    case AVCOL_SPC_BT2020_NCL:
    case AVCOL_SPC_BT2020_CL:
      rule = {.matrix = SWS_CS_BT2020, .kr = 0.2627, .kb = 0.0593};
      break;
    default:
      break;
  }
  rule.full_range = range == AVCOL_RANGE_JPEG || plain_format(format) != format;
  return rule;
}

SwsContext* Converter::scaler(const Key& key) {
  const auto found = std::find_if(scalers_.begin(), scalers_.end(), [&](const Scaler& s) { return s.key == key; });
  if (found != scalers_.end()) {
    std::rotate(scalers_.begin(), found, found + 1);
    return scalers_.front().sws.get();
  }
  SwsPtr sws(sws_alloc_context());
  if (!sws) throw std::bad_alloc();
  const auto format = static_cast<AVPixelFormat>(key.format);
  if (!sws_isSupportedInput(plain_format(format))) {
    throw Error("convert", std::string("pixel format ") + av_get_pix_fmt_name(format) + " cannot be converted");
  }
  set(sws.get(), "srcw", key.width);
  set(sws.get(), "srch", key.height);
  set(sws.get(), "src_format", plain_format(format));
  set(sws.get(), "dstw", key.resized_width);
  set(sws.get(), "dsth", key.resized_height);
  set(sws.get(), "dst_format", AV_PIX_FMT_RGB24);
  set(sws.get(), "sws_flags", SWS_BILINEAR | SWS_ACCURATE_RND | SWS_FULL_CHR_H_INT | SWS_FULL_CHR_H_INP | SWS_BITEXACT);
  const AVPixFmtDescriptor* description = av_pix_fmt_desc_get(format);
  if (description->log2_chroma_w == 1) {
    const auto [x, y] = chroma_position(static_cast<AVChromaLocation>(key.chroma_location));
    set(sws.get(), "src_h_chr_pos", x);
    if (description->log2_chroma_h == 1) set(sws.get(), "src_v_chr_pos", y);
  }
  const ColorRule rule = color_rule(key.width, key.height, static_cast<AVColorSpace>(key.color_space),
                                    static_cast<AVColorRange>(key.color_range), format);
  const int* matrix = sws_getCoefficients(rule.matrix);
  constexpr int kOne = 1 << 16;
  sws_setColorspaceDetails(sws.get(), matrix, rule.full_range, sws_getCoefficients(SWS_CS_DEFAULT), 1, 0, kOne, kOne);
  check(sws_init_context(sws.get(), nullptr, nullptr), "convert", "scaler");
  if (scalers_.size() == kMaxScalers) scalers_.pop_back();
  scalers_.insert(scalers_.begin(), Scaler{key, std::move(sws)});
  return scalers_.front().sws.get();
}

const ResamplePlan& Converter::plan(const Key& key, const Rectangle& rectangle) {
  if (key == plan_key_ && rectangle == plan_rectangle_) return plan_;
  const double scale_x = static_cast<double>(key.width) / key.resized_width;
  const double scale_y = static_cast<double>(key.height) / key.resized_height;
  const auto [x, y] = chroma_position(static_cast<AVChromaLocation>(key.chroma_location));
  const ColorRule rule = color_rule(key.width, key.height, static_cast<AVColorSpace>(key.color_space),
                                    static_cast<AVColorRange>(key.color_range), static_cast<AVPixelFormat>(key.format));
  constexpr double kPositions = 256;  // of a luma pixel
  plan_.luma_x = AxisFilter::luma(key.width, scale_x, rectangle.x, rectangle.width);
  plan_.luma_y = AxisFilter::luma(key.height, scale_y, rectangle.y, rectangle.height);
  plan_.chroma_x = AxisFilter::chroma(key.width, x / kPositions, scale_x, rectangle.x, rectangle.width);
  plan_.chroma_y = AxisFilter::chroma(key.height, y / kPositions, scale_y, rectangle.y, rectangle.height);
  plan_.color = ColorMatrix::make(rule.kr, rule.kb, rule.full_range);
  plan_key_ = key;
  plan_rectangle_ = rectangle;
  return plan_;
}

void Converter::scale(const AVFrame& frame, const Key& key, const Rectangle& rectangle, const Target& target) {
  // swscale may write whole vectors beyond the end of a row.
  const ptrdiff_t stride = (key.resized_width * kChannels + 63) / 64 * 64;
  scaled_.resize(static_cast<size_t>(stride) * static_cast<size_t>(key.resized_height) + 128);
  auto* const base = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(scaled_.data()) + 63) / 64 * 64);
  uint8_t* planes[4] = {base};
  const int strides[4] = {static_cast<int>(stride)};
  check(sws_scale(scaler(key), frame.data, frame.linesize, 0, frame.height, planes, strides), "convert", "scaling");
  for (int r = 0; r < rectangle.height; ++r) {
    const uint8_t* from = base + (rectangle.y + r) * stride + rectangle.x * kChannels;
    uint8_t* to = target.origin + r * target.down;
    if (target.right == kChannels) {
      std::memcpy(to, from, static_cast<size_t>(rectangle.width * kChannels));
      continue;
    }
    for (int c = 0; c < rectangle.width; ++c, from += kChannels, to += target.right) {
      to[0] = from[0];
      to[1] = from[1];
      to[2] = from[2];
    }
  }
}

void Converter::convert(const AVFrame& frame, Orientation orientation, const View& view, uint8_t* out) {
  // The picture is resized as it is coded; turning and mirroring only change where its pixels go.
  const bool sideways = orientation.degrees % 180 != 0;
  const int width = sideways ? view.resized_height : view.resized_width;
  const int height = sideways ? view.resized_width : view.resized_height;
  Rectangle rectangle{view.x, view.y, view.width, view.height};
  if (sideways) rectangle = {view.y, view.x, view.height, view.width};
  bool leftwards = orientation.degrees == 180 || orientation.degrees == 270;
  const bool upwards = orientation.degrees == 90 || orientation.degrees == 180;
  if (leftwards) rectangle.x = width - rectangle.x - rectangle.width;
  if (upwards) rectangle.y = height - rectangle.y - rectangle.height;
  if (orientation.mirrored) {
    rectangle.x = width - rectangle.x - rectangle.width;
    leftwards = !leftwards;
  }

  const ptrdiff_t row = static_cast<ptrdiff_t>(view.width) * kChannels;
  ptrdiff_t column = kChannels;
  Target target{out, 0, 0};
  if (view.mirrored) {
    target.origin += (view.width - 1) * column;
    column = -column;
  }
  target.right = sideways ? row : column;
  target.down = sideways ? column : row;
  if (leftwards) {
    target.origin += (rectangle.width - 1) * target.right;
    target.right = -target.right;
  }
  if (upwards) {
    target.origin += (rectangle.height - 1) * target.down;
    target.down = -target.down;
  }

  const Key key{frame.width,       frame.height,          frame.format, frame.colorspace,
                frame.color_range, frame.chroma_location, width,        height};
  if (plain_format(static_cast<AVPixelFormat>(frame.format)) != AV_PIX_FMT_YUV420P) {
    scale(frame, key, rectangle, target);
    return;
  }
  resampler_.run(
      plan(key, rectangle),
      {{{frame.data[0], frame.linesize[0]}, {frame.data[1], frame.linesize[1]}, {frame.data[2], frame.linesize[2]}}},
      target);
}

}  // namespace pyvdl
