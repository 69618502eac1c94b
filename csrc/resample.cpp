#include "resample.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

// One body of code for every instruction set, in the compiler's own vectors; the processor's best is chosen at load
// time. All arithmetic is on integers, so every one gives the same bytes. Sanitizers cannot follow the choice, so their
// builds define PYVDL_NO_CLONES.
#if defined(__x86_64__) && defined(__linux__) && !defined(PYVDL_NO_CLONES)
#define PYVDL_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define PYVDL_CLONES
#endif
#define PYVDL_INLINE inline __attribute__((always_inline))

namespace pyvdl {
namespace {

constexpr int kRows = 8;          // output rows made together, one a lane; source columns summed together
constexpr int kFractionBits = 7;  // of samples between the passes: 255 fills 15 bits
constexpr int kColorBits = 13;    // of colour factors
constexpr int kVerticalShift = AxisFilter::kWeightBits - kFractionBits;
constexpr int kColorShift = kFractionBits + kColorBits;

template <typename T, int N>
struct Vector {
  using type [[gnu::vector_size(sizeof(T) * N)]] = T;
};
using Lanes = Vector<int32_t, kRows>::type;
using LanesShort = Vector<int16_t, kRows>::type;
using LanesBytes = Vector<uint8_t, kRows>::type;

template <typename T>
PYVDL_INLINE T load(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

#if defined(__clang__) || __GNUC__ >= 12
#define PYVDL_LOW(a, b) __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define PYVDL_HIGH(a, b) __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#else
#define PYVDL_LOW(a, b) __builtin_shuffle(a, b, LanesShort{0, 8, 1, 9, 2, 10, 3, 11})
#define PYVDL_HIGH(a, b) __builtin_shuffle(a, b, LanesShort{4, 12, 5, 13, 6, 14, 7, 15})
#endif

PYVDL_INLINE void transpose(LanesShort (&rows)[kRows]) {
  for (int pass = 0; pass < 3; ++pass) {
    LanesShort next[kRows];
    for (int i = 0; i < kRows / 2; ++i) {
      next[2 * i] = PYVDL_LOW(rows[i], rows[i + kRows / 2]);
      next[2 * i + 1] = PYVDL_HIGH(rows[i], rows[i + kRows / 2]);
    }
    for (int i = 0; i < kRows; ++i) rows[i] = next[i];
  }
}

// Output rows `row` to `row + kRows` (the last one repeated where there are fewer) of the columns that the horizontal
// pass needs, to `out` as [column][row].
PYVDL_INLINE void vertical(const Plane& plane, const AxisFilter& x, const AxisFilter& y, int row, int16_t* out) {
  const int last = static_cast<int>(y.offsets.size()) - 1;
  const uint8_t* sources[kRows];
  const int32_t* weights[kRows];
  for (int r = 0; r < kRows; ++r) {
    const int at = std::min(row + r, last);
    sources[r] = plane.data + (y.first + y.offsets[static_cast<size_t>(at)]) * plane.stride + x.first;
    weights[r] = y.weights.data() + static_cast<ptrdiff_t>(at) * y.taps;
  }
  int column = 0;
  for (; column + kRows <= x.span; column += kRows) {
    LanesShort block[kRows];
    for (int r = 0; r < kRows; ++r) {
      Lanes sum = Lanes{} + (1 << (kVerticalShift - 1));
      const uint8_t* source = sources[r] + column;
      for (int t = 0; t < y.taps; ++t, source += plane.stride) {
        sum += __builtin_convertvector(__builtin_convertvector(load<LanesBytes>(source), LanesShort), Lanes) *
               weights[r][t];
      }
      block[r] = __builtin_convertvector(sum >> kVerticalShift, LanesShort);
    }
    transpose(block);
    std::memcpy(out + column * kRows, block, sizeof(block));
  }
  for (; column < x.span; ++column) {
    for (int r = 0; r < kRows; ++r) {
      int32_t sum = 1 << (kVerticalShift - 1);
      for (int t = 0; t < y.taps; ++t) sum += sources[r][t * plane.stride + column] * weights[r][t];
      out[column * kRows + r] = static_cast<int16_t>(sum >> kVerticalShift);
    }
  }
}

// Output column `column` of a block of rows, with kFractionBits.
PYVDL_INLINE Lanes horizontal(const int16_t* block, const AxisFilter& x, int column) {
  Lanes sum = Lanes{} + (1 << (AxisFilter::kWeightBits - 1));
  const int16_t* sample = block + x.offsets[static_cast<size_t>(column)] * kRows;
  const int32_t* weight = x.weights.data() + static_cast<ptrdiff_t>(column) * x.taps;
  for (int t = 0; t < x.taps; ++t, sample += kRows) {
    sum += __builtin_convertvector(load<LanesShort>(sample), Lanes) * weight[t];
  }
  return sum >> AxisFilter::kWeightBits;
}

PYVDL_INLINE Lanes to_byte(Lanes value) {
  value = (value + (1 << (kColorShift - 1))) >> kColorShift;
  value = value < 0 ? Lanes{} : value;
  return value > 255 ? Lanes{} + 255 : value;
}

PYVDL_CLONES void run_block(const ResamplePlan& plan, const std::array<Plane, 3>& planes, int row,
                            int16_t* const* blocks, const Target& target) {
  vertical(planes[0], plan.luma_x, plan.luma_y, row, blocks[0]);
  vertical(planes[1], plan.chroma_x, plan.chroma_y, row, blocks[1]);
  vertical(planes[2], plan.chroma_x, plan.chroma_y, row, blocks[2]);
  const ColorMatrix& color = plan.color;
  const int rows = std::min(kRows, static_cast<int>(plan.luma_y.offsets.size()) - row);
  const int columns = static_cast<int>(plan.luma_x.offsets.size());
  uint8_t* column_out = target.origin + row * target.down;
  for (int column = 0; column < columns; ++column, column_out += target.right) {
    const Lanes y = (horizontal(blocks[0], plan.luma_x, column) - (color.y_offset << kFractionBits)) * color.y;
    const Lanes u = horizontal(blocks[1], plan.chroma_x, column) - (128 << kFractionBits);
    const Lanes v = horizontal(blocks[2], plan.chroma_x, column) - (128 << kFractionBits);
    const Lanes red = to_byte(y + v * color.r_from_v);
    const Lanes green = to_byte(y + u * color.g_from_u + v * color.g_from_v);
    const Lanes blue = to_byte(y + u * color.b_from_u);
    const Lanes packed = red | green << 8 | blue << 16;
    uint32_t pixels[kRows];
    std::memcpy(pixels, &packed, sizeof(pixels));
    uint8_t* out = column_out;
    for (int r = 0; r < rows; ++r, out += target.down) {
      const auto red_green = static_cast<uint16_t>(pixels[r]);  // little-endian, as all targets are
      std::memcpy(out, &red_green, 2);
      out[2] = static_cast<uint8_t>(pixels[r] >> 16);
    }
  }
}

struct Run {  // of source samples that make one output sample
  int first = 0;
  std::vector<double> weights;  // their sum is 1
};

std::vector<Run> triangles(int source_size, double scale, int begin, int count) {
  const double support = std::max(scale, 1.0);
  std::vector<Run> runs;
  for (int k = begin; k < begin + count; ++k) {
    const double center = (k + 0.5) * scale;
    const int first = std::clamp(static_cast<int>(std::floor(center - support + 0.5)), 0, source_size - 1);
    const int last = std::clamp(static_cast<int>(std::ceil(center + support - 0.5)), first + 1, source_size);
    Run run{first, {}};
    double sum = 0;
    for (int i = first; i < last; ++i) {
      run.weights.push_back(std::max(0.0, 1 - std::abs(i + 0.5 - center) / support));
      sum += run.weights.back();
    }
    for (double& weight : run.weights) weight /= sum;
    runs.push_back(std::move(run));
  }
  return runs;
}

// All with the same number of taps, in fixed point.
AxisFilter pack(const std::vector<Run>& runs, int source_size) {
  AxisFilter filter;
  for (const Run& run : runs) filter.taps = std::max(filter.taps, static_cast<int>(run.weights.size()));
  const auto start = [&](const Run& run) { return std::min(run.first, source_size - filter.taps); };
  filter.first = source_size;
  int end = 0;
  for (const Run& run : runs) {
    filter.first = std::min(filter.first, start(run));
    end = std::max(end, start(run) + filter.taps);
  }
  filter.span = end - filter.first;
  filter.weights.assign(runs.size() * static_cast<size_t>(filter.taps), 0);
  int32_t* weights = filter.weights.data();
  for (const Run& run : runs) {
    filter.offsets.push_back(start(run) - filter.first);
    int32_t left = 1 << AxisFilter::kWeightBits;
    int32_t* at = weights + (run.first - start(run));
    for (const double weight : run.weights) {
      *at = static_cast<int32_t>(std::lround(weight * (1 << AxisFilter::kWeightBits)));
      left -= *at++;
    }
    *std::max_element(weights, weights + filter.taps) += left;  // what rounding lost
    weights += filter.taps;
  }
  return filter;
}

}  // namespace

AxisFilter AxisFilter::luma(int source_size, double scale, int begin, int count) {
  return pack(triangles(source_size, scale, begin, count), source_size);
}

AxisFilter AxisFilter::chroma(int source_size, double offset, double scale, int begin, int count) {
  const int size = (source_size + 1) / 2;
  std::vector<Run> runs;
  for (const Run& full : triangles(source_size, scale, begin, count)) {
    const auto place = [&](size_t i) { return (full.first + static_cast<double>(i) - offset) / 2; };
    const auto within = [&](double at) { return std::clamp(static_cast<int>(at), 0, size - 1); };
    Run run{within(std::floor(place(0))), {}};
    const int last = within(std::floor(place(full.weights.size() - 1)) + 1);
    run.weights.assign(static_cast<size_t>(last - run.first + 1), 0.0);
    for (size_t i = 0; i < full.weights.size(); ++i) {
      const double before = std::floor(place(i));
      const double part = place(i) - before;
      run.weights[static_cast<size_t>(within(before) - run.first)] += full.weights[i] * (1 - part);
      run.weights[static_cast<size_t>(within(before + 1) - run.first)] += full.weights[i] * part;
    }
    runs.push_back(std::move(run));
  }
  return pack(runs, size);
}

ColorMatrix ColorMatrix::make(double kr, double kb, bool full_range) {
  const double kg = 1 - kr - kb;
  const double luma = full_range ? 1.0 : 255.0 / 219.0;
  const double chroma = full_range ? 1.0 : 255.0 / 224.0;
  const auto fixed = [](double factor) { return static_cast<int32_t>(std::lround(factor * (1 << kColorBits))); };
  return {.y_offset = full_range ? 0 : 16,
          .y = fixed(luma),
          .r_from_v = fixed(2 * (1 - kr) * chroma),
          .g_from_u = -fixed(2 * (1 - kb) * kb / kg * chroma),
          .g_from_v = -fixed(2 * (1 - kr) * kr / kg * chroma),
          .b_from_u = fixed(2 * (1 - kb) * chroma)};
}

void Resampler::run(const ResamplePlan& plan, const std::array<Plane, 3>& planes, const Target& target) {
  int16_t* blocks[3];
  for (size_t i = 0; i < planes.size(); ++i) {
    columns_[i].resize(static_cast<size_t>((i == 0 ? plan.luma_x : plan.chroma_x).span) * kRows);
    blocks[i] = columns_[i].data();
  }
  const int rows = static_cast<int>(plan.luma_y.offsets.size());
  for (int row = 0; row < rows; row += kRows) run_block(plan, planes, row, blocks, target);
}

}  // namespace pyvdl
