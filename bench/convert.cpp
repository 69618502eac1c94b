// Conversion alone, which Python cannot call: pyvdl's converter, and swscale as it is commonly used, which scales the
// whole picture and cuts the result. Both with the settings that keep the picture exact.
#include "convert.h"

#include <algorithm>
#include <cstring>
#include <ctime>
#include <string>
#include <vector>

using namespace pyvdl;

namespace {

struct Geometry {
  int width;
  int height;
  bool bt709;
  View view;
};

// Pictures as a decoder gives them; `pixels` is uint8[count, height * 3 / 2, width], planes Y, U, V one behind the
// other.
std::vector<FramePtr> make_frames(const uint8_t* pixels, int count, const Geometry& geometry) {
  std::vector<FramePtr> frames;
  for (int i = 0; i < count; ++i) {
    FramePtr frame = make_frame();
    frame->width = geometry.width;
    frame->height = geometry.height;
    frame->format = AV_PIX_FMT_YUV420P;
    frame->colorspace = geometry.bt709 ? AVCOL_SPC_BT709 : AVCOL_SPC_SMPTE170M;
    frame->color_range = AVCOL_RANGE_MPEG;
    frame->chroma_location = AVCHROMA_LOC_LEFT;
    check(av_frame_get_buffer(frame.get(), 0), "convert", "frame");
    for (int plane = 0; plane < 3; ++plane) {
      const int width = plane ? geometry.width / 2 : geometry.width;
      const int height = plane ? geometry.height / 2 : geometry.height;
      av_image_copy_plane(frame->data[plane], frame->linesize[plane], pixels, width, width, height);
      pixels += static_cast<ptrdiff_t>(width) * height;
    }
    frames.push_back(std::move(frame));
  }
  return frames;
}

class FullFrameScaler {
 public:
  explicit FullFrameScaler(const Geometry& geometry) : view_(geometry.view), sws_(sws_alloc_context()) {
    if (!sws_) throw std::bad_alloc();
    const auto set = [&](const char* name, int value) {
      check(av_opt_set_int(sws_.get(), name, value, 0), "convert", name);
    };
    set("srcw", geometry.width);
    set("srch", geometry.height);
    set("src_format", AV_PIX_FMT_YUV420P);
    set("dstw", view_.resized_width);
    set("dsth", view_.resized_height);
    set("dst_format", AV_PIX_FMT_RGB24);
    set("sws_flags", SWS_BILINEAR | SWS_ACCURATE_RND | SWS_FULL_CHR_H_INT | SWS_FULL_CHR_H_INP);
    set("src_h_chr_pos", 0);
    set("src_v_chr_pos", 128);
    constexpr int kOne = 1 << 16;
    sws_setColorspaceDetails(sws_.get(), sws_getCoefficients(geometry.bt709 ? SWS_CS_ITU709 : SWS_CS_ITU601), 0,
                             sws_getCoefficients(SWS_CS_DEFAULT), 1, 0, kOne, kOne);
    check(sws_init_context(sws_.get(), nullptr, nullptr), "convert", "scaler");
    stride_ = (view_.resized_width * 3 + 63) / 64 * 64;  // whole vectors are written
    scaled_.resize(static_cast<size_t>(stride_) * static_cast<size_t>(view_.resized_height) + 64);
  }

  void convert(const AVFrame& frame, uint8_t* out) {
    uint8_t* const scaled = scaled_.data();
    check(sws_scale(sws_.get(), frame.data, frame.linesize, 0, frame.height, &scaled, &stride_), "convert", "scaling");
    const auto row = static_cast<ptrdiff_t>(view_.width) * 3;
    for (ptrdiff_t y = 0; y < view_.height; ++y) {
      std::memcpy(out + y * row, scaled + (view_.y + y) * stride_ + view_.x * 3, static_cast<size_t>(row));
    }
  }

 private:
  View view_;
  SwsPtr sws_;
  int stride_ = 0;
  std::vector<uint8_t> scaled_;
};

double thread_seconds() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// Converts each picture `rounds` times, in turns; gives CPU seconds a picture. A first round is not timed.
template <class Convert>
double time_conversion(const std::vector<FramePtr>& frames, const Geometry& geometry, int rounds, uint8_t* out,
                       Convert convert) {
  const ptrdiff_t bytes = static_cast<ptrdiff_t>(geometry.view.width) * geometry.view.height * 3;
  double start = 0;
  for (int round = 0; round <= rounds; ++round) {
    if (round == 1) start = thread_seconds();
    uint8_t* to = out;
    for (const FramePtr& frame : frames) {
      convert(*frame, to);
      to += bytes;
    }
  }
  return (thread_seconds() - start) / rounds / static_cast<double>(frames.size());
}

}  // namespace

// Resizes to resized_width x resized_height and cuts the middle into uint8[count, size, size, 3]. Gives the CPU seconds
// of one picture; below zero: it failed.
extern "C" double convert_pictures(const uint8_t* pixels, int count, int width, int height, int bt709,
                                   int resized_width, int resized_height, int size, int by_pyvdl, int rounds,
                                   uint8_t* out) {
  const View view{resized_width, resized_height, (resized_width - size) / 2, (resized_height - size) / 2, size,
                  size,          false};
  const Geometry geometry{width, height, bt709 != 0, view};
  try {
    const std::vector<FramePtr> frames = make_frames(pixels, count, geometry);
    if (by_pyvdl) {
      Converter converter;
      return time_conversion(frames, geometry, rounds, out, [&](const AVFrame& frame, uint8_t* to) {
        converter.convert(frame, Orientation{}, view, to);
      });
    }
    FullFrameScaler scaler(geometry);
    return time_conversion(frames, geometry, rounds, out,
                           [&](const AVFrame& frame, uint8_t* to) { scaler.convert(frame, to); });
  } catch (const std::exception&) {
    return -1;
  }
}

extern "C" const char* ffmpeg_version() { return av_version_info(); }
