// Planar 8-bit 4:2:0 to RGB in one pass: each plane is resized straight to the cropped output, antialiased, and the
// colours are computed there. Pixels outside the crop are never touched. Pure; no FFmpeg calls.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace pyvdl {

// Weighted sums of source samples for a run of output samples, in fixed point.
struct AxisFilter {
  int first = 0;                 // source sample that offsets count from
  int span = 0;                  // source samples used, from `first`
  int taps = 0;                  // weights of one output sample
  std::vector<int32_t> offsets;  // by output sample
  std::vector<int32_t> weights;  // [output sample][tap], the sum of each output sample's is 1 << kWeightBits

  static constexpr int kWeightBits = 14;

  // Outputs `begin` to `begin + count` of `source_size` samples resized by a triangle of `scale` samples (1 where it
  // enlarges). Output k is centred at (k + 0.5) * scale, sample i at i + 0.5. Weights that fall outside are left out
  // and the rest made up to 1.
  static AxisFilter luma(int source_size, double scale, int begin, int count);
  // The same for a plane of half as many samples, as if it were brought to `source_size` linearly first. Its sample i
  // stands at sample 2 * i + offset of the full ones.
  static AxisFilter chroma(int source_size, double offset, double scale, int begin, int count);
};

// RGB from Y'CbCr of the 8-bit scale: y_offset is subtracted from luma, 128 from chroma. Factors have 13 fraction bits.
struct ColorMatrix {
  int y_offset = 16;
  int32_t y = 0, r_from_v = 0, g_from_u = 0, g_from_v = 0, b_from_u = 0;

  static ColorMatrix make(double kr, double kb, bool full_range);
};

// How a picture of one geometry becomes the output. The rectangle is counted in pixels of the resized picture.
struct ResamplePlan {
  AxisFilter luma_x, luma_y, chroma_x, chroma_y;
  ColorMatrix color;
};

struct Plane {
  const uint8_t* data;
  ptrdiff_t stride;
};

// Where pixel (row, column) of the rectangle goes: origin + row * down + column * right.
struct Target {
  uint8_t* origin;
  ptrdiff_t down, right;
};

// Not thread-safe: one per thread.
class Resampler {
 public:
  void run(const ResamplePlan& plan, const std::array<Plane, 3>& planes, const Target& target);

 private:
  std::array<std::vector<int16_t>, 3> columns_;  // rows of a block after the vertical pass, transposed
};

}  // namespace pyvdl
