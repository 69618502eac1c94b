// A decoded frame becomes upright, resized, cropped RGB24 in the caller's memory.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "ffmpeg.h"
#include "resample.h"
#include "sampling.h"

namespace pyvdl {

// How the numbers of a frame are to be read. Untagged matrices follow the usual rule: BT.709 from 1280 pixels of width
// or more than 576 lines on, BT.601 below; untagged range is limited, except for the yuvj formats.
struct ColorRule {
  int matrix = SWS_CS_ITU601;
  double kr = 0.299, kb = 0.114;  // of that matrix
  bool full_range = false;
};
ColorRule color_rule(int width, int height, AVColorSpace space, AVColorRange range, AVPixelFormat format);

// Size of the upright picture.
inline int upright_width(int width, int height, Orientation o) { return o.degrees % 180 ? height : width; }
inline int upright_height(int width, int height, Orientation o) { return o.degrees % 180 ? width : height; }

// 8-bit 4:2:0 goes through Resampler, which touches only what the crop shows; swscale resizes other formats whole.
// Keeps what it made for the last geometries. Not thread-safe: one per thread.
class Converter {
 public:
  // Writes uint8[view.height, view.width, 3] at `out`. Resizes bilinearly, averaging over the covered area when it
  // shrinks.
  void convert(const AVFrame& frame, Orientation orientation, const View& view, uint8_t* out);

 private:
  // The part of the resized picture, as it is coded, that the view shows.
  struct Rectangle {
    int x, y, width, height;
    bool operator==(const Rectangle&) const = default;
  };
  struct Key {
    int width, height, format, color_space, color_range, chroma_location, resized_width, resized_height;
    bool operator==(const Key&) const = default;
  };
  struct Scaler {
    Key key;
    SwsPtr sws;
  };

  const ResamplePlan& plan(const Key& key, const Rectangle& rectangle);
  SwsContext* scaler(const Key& key);
  void scale(const AVFrame& frame, const Key& key, const Rectangle& rectangle, const Target& target);

  Resampler resampler_;
  ResamplePlan plan_;
  Key plan_key_{};
  Rectangle plan_rectangle_{};
  std::vector<Scaler> scalers_;
  std::vector<uint8_t> scaled_;
};

}  // namespace pyvdl
