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
      rule.matrix = SWS_CS_ITU709;
      break;
    case AVCOL_SPC_BT470BG:
    case AVCOL_SPC_SMPTE170M:
      rule.matrix = SWS_CS_ITU601;
      break;
    case AVCOL_SPC_FCC:
      rule.matrix = SWS_CS_FCC;
      break;
    case AVCOL_SPC_SMPTE240M:
      rule.matrix = SWS_CS_SMPTE240M;
      break;
    case AVCOL_SPC_BT2020_NCL:
    case AVCOL_SPC_BT2020_CL:
      rule.matrix = SWS_CS_BT2020;
      break;
    default:
      rule.matrix = width >= 1280 || height > 576 ? SWS_CS_ITU709 : SWS_CS_ITU601;
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
  set(sws.get(), "dstw", key.out_width);
  set(sws.get(), "dsth", key.out_height);
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

void Converter::convert(const AVFrame& frame, Orientation orientation, const View& view, uint8_t* out) {
  // Resize before turning: the resized picture is the smaller one.
  const bool sideways = orientation.degrees % 180 != 0;
  const int width = sideways ? view.resized_height : view.resized_width;
  const int height = sideways ? view.resized_width : view.resized_height;
  const Key key{frame.width,       frame.height,          frame.format, frame.colorspace,
                frame.color_range, frame.chroma_location, width,        height};
  // swscale may write whole vectors beyond the end of a row.
  const ptrdiff_t stride = (width * kChannels + 63) / 64 * 64;
  scaled_.resize(static_cast<size_t>(stride) * static_cast<size_t>(height) + 128);
  auto* const base = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(scaled_.data()) + 63) / 64 * 64);
  uint8_t* planes[4] = {base};
  const int strides[4] = {static_cast<int>(stride)};
  check(sws_scale(scaler(key), frame.data, frame.linesize, 0, frame.height, planes, strides), "convert", "scaling");

  // Output pixel (r, c) comes from the byte at origin + r * down + c * right of the resized picture.
  const ptrdiff_t pixel = orientation.mirrored ? -kChannels : kChannels;
  const auto address = [&](ptrdiff_t x, ptrdiff_t y) {
    return base + y * stride + (orientation.mirrored ? width - 1 - x : x) * kChannels;
  };
  const uint8_t* origin = nullptr;
  ptrdiff_t right = 0, down = 0;
  switch (orientation.degrees) {
    case 0:
      origin = address(view.x, view.y), right = pixel, down = stride;
      break;
    case 90:
      origin = address(view.y, height - 1 - view.x), right = -stride, down = pixel;
      break;
    case 180:
      origin = address(width - 1 - view.x, height - 1 - view.y), right = -pixel, down = -stride;
      break;
    default:
      origin = address(width - 1 - view.y, view.x), right = stride, down = -pixel;
  }
  if (view.mirrored) {
    origin += right * (view.width - 1);
    right = -right;
  }
  for (int r = 0; r < view.height; ++r) {
    const uint8_t* from = origin + r * down;
    uint8_t* to = out + static_cast<ptrdiff_t>(r) * view.width * kChannels;
    if (right == kChannels) {
      std::memcpy(to, from, static_cast<size_t>(view.width * kChannels));
      continue;
    }
    for (int c = 0; c < view.width; ++c, from += right, to += kChannels) {
      to[0] = from[0];
      to[1] = from[1];
      to[2] = from[2];
    }
  }
}

}  // namespace pyvdl
