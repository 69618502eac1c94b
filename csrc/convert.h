// A decoded frame becomes upright, resized, cropped RGB24 in the caller's memory.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "ffmpeg.h"
#include "sampling.h"

namespace pyvdl {

// How the numbers of a frame are to be read. Untagged matrices follow the usual rule: BT.709 from 1280 pixels of width
// or more than 576 lines on, BT.601 below; untagged range is limited, except for the yuvj formats.
struct ColorRule {
  int matrix = SWS_CS_ITU601;
  bool full_range = false;
};
ColorRule color_rule(int width, int height, AVColorSpace space, AVColorRange range, AVPixelFormat format);

// Size of the upright picture.
inline int upright_width(int width, int height, Orientation o) { return o.degrees % 180 ? height : width; }
inline int upright_height(int width, int height, Orientation o) { return o.degrees % 180 ? width : height; }

// Keeps the scaler of the last few geometries. Not thread-safe: one per thread.
class Converter {
 public:
  // Writes uint8[view.height, view.width, 3] at `out`. Resizes bilinearly, averaging over the covered area when it
  // shrinks.
  void convert(const AVFrame& frame, Orientation orientation, const View& view, uint8_t* out);

 private:
  struct Key {
    int width, height, format, color_space, color_range, chroma_location, out_width, out_height;
    bool operator==(const Key&) const = default;
  };
  struct Scaler {
    Key key;
    SwsPtr sws;
  };
  SwsContext* scaler(const Key& key);

  std::vector<Scaler> scalers_;
  std::vector<uint8_t> scaled_;
};

}  // namespace pyvdl
