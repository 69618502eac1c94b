// The one-pass conversion of 8-bit 4:2:0 against a reference in doubles, for sizes, crops, turns, matrices and chroma
// positions. Prints each failed expectation; the exit status is 1 if there is one.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "convert.h"

namespace {

using namespace pyvdl;
using Image = std::vector<std::array<double, 3>>;  // row by row

constexpr double kWantedDecibels = 45;

struct Case {
  const char* name;
  int width, height;
  View view;  // of the upright picture
  Orientation orientation{};
  AVColorSpace space = AVCOL_SPC_UNSPECIFIED;
  AVColorRange range = AVCOL_RANGE_UNSPECIFIED;
  AVChromaLocation chroma = AVCHROMA_LOC_UNSPECIFIED;
  double kr, kb;
};

// Waves, edges and gradients of all directions, different for each plane.
uint8_t sample(int plane, double x, double y) {
  const double wave = 60 * std::sin((0.11 + 0.02 * plane) * x + 0.07 * y) + 30 * std::cos(0.05 * x - 0.13 * y);
  const double edge = (static_cast<int>(x / 37) + static_cast<int>(y / 29)) % 2 ? 20 : -20;
  return static_cast<uint8_t>(std::clamp(126 + wave + edge, 17.0, 238.0));
}

FramePtr make_picture(const Case& c) {
  FramePtr frame = make_frame();
  frame->width = c.width;
  frame->height = c.height;
  frame->format = AV_PIX_FMT_YUV420P;
  frame->colorspace = c.space;
  frame->color_range = c.range;
  frame->chroma_location = c.chroma;
  check(av_frame_get_buffer(frame.get(), 0), "test", "frame");
  for (int p = 0; p < 3; ++p) {
    const int step = p == 0 ? 1 : 2;
    for (int y = 0; y < (c.height + step - 1) / step; ++y) {
      for (int x = 0; x < (c.width + step - 1) / step; ++x) {
        frame->data[p][y * frame->linesize[p] + x] = sample(p, x * step, y * step);
      }
    }
  }
  return frame;
}

double plane_at(const AVFrame& frame, int p, int x, int y) {
  const int step = p == 0 ? 1 : 2;
  x = std::clamp(x, 0, (frame.width + step - 1) / step - 1);
  y = std::clamp(y, 0, (frame.height + step - 1) / step - 1);
  return frame.data[p][y * frame.linesize[p] + x];
}

// Chroma at luma pixel (x, y), between the four samples around it.
double chroma_at(const AVFrame& frame, int p, int x, int y, double offset_x, double offset_y) {
  const double u = (x - offset_x) / 2, v = (y - offset_y) / 2;
  const int i = static_cast<int>(std::floor(u)), j = static_cast<int>(std::floor(v));
  const double a = u - i, b = v - j;
  return (1 - b) * ((1 - a) * plane_at(frame, p, i, j) + a * plane_at(frame, p, i + 1, j)) +
         b * ((1 - a) * plane_at(frame, p, i, j + 1) + a * plane_at(frame, p, i + 1, j + 1));
}

std::vector<double> triangle(int size, double scale, int output) {
  std::vector<double> weights(static_cast<size_t>(size));
  double sum = 0;
  for (int i = 0; i < size; ++i) {
    const double distance = std::abs(i + 0.5 - (output + 0.5) * scale) / std::max(1.0, scale);
    sum += weights[static_cast<size_t>(i)] = std::max(0.0, 1 - distance);
  }
  for (double& weight : weights) weight /= sum;
  return weights;
}

// Full resolution RGB, turned upright, resized whole, then cut: each step by itself, in doubles.
Image reference(const Case& c, const AVFrame& frame) {
  const double offset_x = c.chroma == AVCHROMA_LOC_CENTER || c.chroma == AVCHROMA_LOC_TOP ? 0.5 : 0;
  const double offset_y = c.chroma == AVCHROMA_LOC_TOPLEFT || c.chroma == AVCHROMA_LOC_TOP ? 0 : 0.5;
  const bool full = c.range == AVCOL_RANGE_JPEG;
  const bool sideways = c.orientation.degrees % 180;
  const int width = sideways ? c.height : c.width, height = sideways ? c.width : c.height;
  Image upright(static_cast<size_t>(width) * static_cast<size_t>(height));
  for (int y = 0; y < c.height; ++y) {
    for (int x = 0; x < c.width; ++x) {
      const double luma = (plane_at(frame, 0, x, y) - (full ? 0 : 16)) * (full ? 1 : 255.0 / 219);
      const double gain = full ? 1 : 255.0 / 224;
      const double u = (chroma_at(frame, 1, x, y, offset_x, offset_y) - 128) * gain;
      const double v = (chroma_at(frame, 2, x, y, offset_x, offset_y) - 128) * gain;
      const double red = luma + 2 * (1 - c.kr) * v, blue = luma + 2 * (1 - c.kb) * u;
      const double green = luma - (2 * (1 - c.kr) * c.kr * v + 2 * (1 - c.kb) * c.kb * u) / (1 - c.kr - c.kb);
      const int mx = c.orientation.mirrored ? c.width - 1 - x : x;
      int tx = mx, ty = y;
      if (c.orientation.degrees == 90) tx = c.height - 1 - y, ty = mx;
      if (c.orientation.degrees == 180) tx = c.width - 1 - mx, ty = c.height - 1 - y;
      if (c.orientation.degrees == 270) tx = y, ty = c.width - 1 - mx;
      upright[static_cast<size_t>(ty) * static_cast<size_t>(width) + static_cast<size_t>(tx)] = {red, green, blue};
    }
  }
  Image rows(static_cast<size_t>(c.view.height) * static_cast<size_t>(width));
  for (int r = 0; r < c.view.height; ++r) {
    const auto weights = triangle(height, static_cast<double>(height) / c.view.resized_height, c.view.y + r);
    for (int y = 0; y < height; ++y) {
      if (weights[static_cast<size_t>(y)] == 0) continue;
      for (int x = 0; x < width; ++x) {
        for (size_t k = 0; k < 3; ++k) {
          rows[static_cast<size_t>(r * width + x)][k] +=
              weights[static_cast<size_t>(y)] * upright[static_cast<size_t>(y * width + x)][k];
        }
      }
    }
  }
  Image out(static_cast<size_t>(c.view.height) * static_cast<size_t>(c.view.width));
  for (int i = 0; i < c.view.width; ++i) {
    const auto weights = triangle(width, static_cast<double>(width) / c.view.resized_width, c.view.x + i);
    const int to = c.view.mirrored ? c.view.width - 1 - i : i;
    for (int r = 0; r < c.view.height; ++r) {
      for (int x = 0; x < width; ++x) {
        for (size_t k = 0; k < 3; ++k) {
          out[static_cast<size_t>(r * c.view.width + to)][k] +=
              weights[static_cast<size_t>(x)] * rows[static_cast<size_t>(r * width + x)][k];
        }
      }
    }
  }
  return out;
}

bool agrees(const Case& c) {
  const FramePtr frame = make_picture(c);
  constexpr size_t kGuard = 64;
  const size_t bytes = static_cast<size_t>(c.view.height) * static_cast<size_t>(c.view.width) * 3;
  std::vector<uint8_t> out(bytes + 2 * kGuard, 0xA5);
  Converter converter;
  converter.convert(*frame, c.orientation, c.view, out.data() + kGuard);
  const auto untouched = [](uint8_t byte) { return byte == 0xA5; };
  const bool inside = std::all_of(out.begin(), out.begin() + kGuard, untouched) &&
                      std::all_of(out.end() - kGuard, out.end(), untouched);
  const Image wanted = reference(c, *frame);
  double squares = 0;
  for (size_t i = 0; i < bytes; ++i) {
    const double difference = out[kGuard + i] - std::clamp(std::round(wanted[i / 3][i % 3]), 0.0, 255.0);
    squares += difference * difference;
  }
  const double decibels = 10 * std::log10(255 * 255 / std::max(1e-9, squares / static_cast<double>(bytes)));
  const bool good = decibels >= kWantedDecibels && inside;
  std::printf("%s %-34s %.1f dB%s\n", good ? "ok  " : "FAIL", c.name, decibels, inside ? "" : ", wrote outside");
  return good;
}

}  // namespace

int main() {
  const View down{.resized_width = 455, .resized_height = 256, .x = 115, .y = 16, .width = 224, .height = 224};
  const View tall{.resized_width = 60, .resized_height = 107, .x = 3, .y = 40, .width = 51, .height = 53};
  const Case cases[] = {
      {.name = "640x360, BT.601", .width = 640, .height = 360, .view = down, .kr = 0.299, .kb = 0.114},
      {.name = "1280x720, BT.709 by size", .width = 1280, .height = 720, .view = down, .kr = 0.2126, .kb = 0.0722},
      {.name = "1920x1080", .width = 1920, .height = 1080, .view = down, .kr = 0.2126, .kb = 0.0722},
      {.name = "odd 351x197, enlarged", .width = 351, .height = 197, .view = down, .kr = 0.299, .kb = 0.114},
      {.name = "full range, BT.2020, centred chroma",
       .width = 640,
       .height = 360,
       .view = down,
       .space = AVCOL_SPC_BT2020_NCL,
       .range = AVCOL_RANGE_JPEG,
       .chroma = AVCHROMA_LOC_CENTER,
       .kr = 0.2627,
       .kb = 0.0593},
      {.name = "chroma on top left",
       .width = 640,
       .height = 360,
       .view = down,
       .chroma = AVCHROMA_LOC_TOPLEFT,
       .kr = 0.299,
       .kb = 0.114},
      {.name = "turned by 90",
       .width = 320,
       .height = 180,
       .view = tall,
       .orientation = {90},
       .kr = 0.299,
       .kb = 0.114},
      {.name = "turned by 270, mirrored picture",
       .width = 320,
       .height = 180,
       .view = tall,
       .orientation = {270, true},
       .kr = 0.299,
       .kb = 0.114},
      {.name = "turned by 180, flipped view",
       .width = 180,
       .height = 320,
       .view =
           {.resized_width = 60, .resized_height = 107, .x = 3, .y = 40, .width = 51, .height = 53, .mirrored = true},
       .orientation = {180},
       .kr = 0.299,
       .kb = 0.114},
      {.name = "2x2 to 9x9",
       .width = 2,
       .height = 2,
       .view = {.resized_width = 9, .resized_height = 9, .width = 9, .height = 9},
       .kr = 0.299,
       .kb = 0.114},
      {.name = "1x1 to 3x5",
       .width = 1,
       .height = 1,
       .view = {.resized_width = 3, .resized_height = 5, .width = 3, .height = 5},
       .kr = 0.299,
       .kb = 0.114},
      {.name = "very small from large",
       .width = 1280,
       .height = 720,
       .view = {.resized_width = 16, .resized_height = 9, .x = 1, .y = 1, .width = 13, .height = 7},
       .kr = 0.2126,
       .kb = 0.0722},
  };
  const auto failures = std::count_if(std::begin(cases), std::end(cases), [](const Case& c) { return !agrees(c); });
  std::printf("%d failures\n", static_cast<int>(failures));
  return failures > 0;
}
