// The Python module pyvdl._core: argument conversion, the GIL, errors and buffers. Everything else is in the library.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>
#include <unistd.h>

#include <map>

#include "clip_loader.h"

extern "C" {
#include <libavutil/ffversion.h>
}

namespace nb = nanobind;
using namespace nb::literals;

namespace pyvdl {
namespace {

using Bytes = nb::ndarray<nb::numpy, const uint8_t>;
using Times = nb::ndarray<nb::numpy, const double, nb::ndim<1>>;

// A source and what keeps its bytes alive.
struct PySource {
  Source source;
  nb::object owner;
};

// Hands a buffer over to numpy, read-only: JAX aliases host memory, so nobody may write to it again.
Bytes to_numpy(AlignedBytes data, std::initializer_list<size_t> shape) {
  uint8_t* const bytes = data.get();
  nb::capsule owner(data.release(), [](void* p) noexcept { FreeBytes()(static_cast<uint8_t*>(p)); });
  return Bytes(bytes, shape, owner);
}

Times to_numpy(std::vector<double> values) {
  auto* const kept = new std::vector<double>(std::move(values));
  nb::capsule owner(kept, [](void* p) noexcept { delete static_cast<std::vector<double>*>(p); });
  return Times(kept->data(), {kept->size()}, owner);
}

nb::dict to_dict(const Metadata& m) {
  nb::dict d;
  d["num_frames"] = m.num_frames;
  d["width"] = m.width;
  d["height"] = m.height;
  d["fps"] = m.fps;
  d["duration_seconds"] = m.duration_seconds;
  d["start_seconds"] = m.start_seconds;
  d["codec"] = m.codec;
  d["pixel_format"] = m.pixel_format;
  d["rotation"] = m.rotation;
  d["color_space"] = m.color_space;
  d["color_range"] = m.color_range;
  d["time_base"] = nb::make_tuple(m.time_base.numerator, m.time_base.denominator);
  d["stream_index"] = m.stream_index;
  d["num_video_streams"] = m.num_video_streams;
  d["has_b_frames"] = m.reorder_depth > 0;
  d["container"] = m.container;
  d["truncated"] = m.truncated;
  return d;
}

// A decoder and its converter for use from Python, one thread at a time.
class PyDecoder {
 public:
  PyDecoder(const PySource& source, const DecoderOptions& options) : owner_(source.owner) {
    const nb::gil_scoped_release release;
    decoder_ = open_remembered(source.source, identify(source.source, options.stream), options, Deadline());
  }

  nb::dict metadata() {
    Metadata m;
    {
      const nb::gil_scoped_release release;
      const std::lock_guard lock(mutex_);
      m = decoder_->metadata();
    }
    return to_dict(m);
  }

  int64_t num_frames() const { return decoder_->index().num_frames(); }
  std::vector<int64_t> pts_ticks() const { return decoder_->index().pts(); }
  std::vector<int64_t> key_frames() const { return decoder_->index().key_ranks(); }
  Times pts_seconds() const { return to_numpy(decoder_->index().pts_seconds()); }
  Times durations_seconds() const { return to_numpy(decoder_->index().durations_seconds()); }

  nb::dict stats() {
    DecodeStats s;
    {
      const nb::gil_scoped_release release;
      const std::lock_guard lock(mutex_);
      s = decoder_->stats();
    }
    nb::dict d;
    d["packets_read"] = s.packets_read;
    d["packets_sent"] = s.packets_sent;
    d["frames_decoded"] = s.frames_decoded;
    d["frames_converted"] = s.frames_converted;
    d["seeks"] = s.seeks;
    return d;
  }

  Bytes frames(const std::vector<int64_t>& indices) {
    AlignedBytes data;
    int width = 0, height = 0;
    {
      const nb::gil_scoped_release release;
      const std::lock_guard lock(mutex_);
      const Metadata m = decoder_->metadata();
      width = m.width, height = m.height;
      const size_t frame_bytes = static_cast<size_t>(width) * static_cast<size_t>(height) * 3;
      if (static_cast<int64_t>(frame_bytes * indices.size()) > decoder_->options().limits.max_bytes) {
        throw Error("limits", std::to_string(indices.size()) + " frames of " + std::to_string(frame_bytes) +
                                  " bytes exceed max_bytes = " + std::to_string(decoder_->options().limits.max_bytes));
      }
      data = allocate_aligned(frame_bytes * indices.size());
      std::map<int64_t, size_t> first;  // rank -> its first place in `indices`
      for (size_t i = 0; i < indices.size(); ++i) first.try_emplace(indices[i], i);
      std::vector<int64_t> ranks;
      for (const auto& [rank, place] : first) ranks.push_back(rank);
      const auto slot_of = [&](int64_t rank) { return data.get() + frame_bytes * first.at(rank); };
      decoder_->decode(ranks, [&](int64_t rank, const AVFrame& frame) {
        const Orientation o = decoder_->orientation();
        if (upright_width(frame.width, frame.height, o) != width ||
            upright_height(frame.width, frame.height, o) != height) {
          throw Error("decode", "frame " + std::to_string(rank) + " has another size than the first: stored " +
                                    std::to_string(frame.width) + "x" + std::to_string(frame.height));
        }
        converter_.convert(frame, o, View{width, height, 0, 0, width, height, false}, slot_of(rank));
        decoder_->count_converted();
      });
      for (size_t i = 0; i < indices.size(); ++i) {
        uint8_t* const slot = data.get() + frame_bytes * i;
        if (const uint8_t* const made = slot_of(indices[i]); made != slot) std::memcpy(slot, made, frame_bytes);
      }
    }
    return to_numpy(std::move(data), {indices.size(), static_cast<size_t>(height), static_cast<size_t>(width), 3});
  }

  // The stored planes: list of (bytes, rows, columns, bytes of a sample).
  nb::list planes(int64_t index) {
    struct Plane {
      AlignedBytes data;
      size_t rows, row_bytes;
    };
    std::vector<Plane> planes;
    size_t sample_bytes = 1;
    {
      const nb::gil_scoped_release release;
      const std::lock_guard lock(mutex_);
      const int64_t ranks[1] = {index};
      decoder_->decode(ranks, [&](int64_t, const AVFrame& frame) {
        planes.clear();
        const auto format = static_cast<AVPixelFormat>(frame.format);
        const AVPixFmtDescriptor* d = av_pix_fmt_desc_get(format);
        sample_bytes = d->comp[0].depth > 8 ? 2 : 1;
        for (int p = 0; p < av_pix_fmt_count_planes(format); ++p) {
          const int shift = p == 1 || p == 2 ? d->log2_chroma_h : 0;
          const auto rows = static_cast<size_t>(AV_CEIL_RSHIFT(frame.height, shift));
          const auto row_bytes =
              static_cast<size_t>(check(av_image_get_linesize(format, frame.width, p), "convert", "plane size"));
          Plane plane{allocate_aligned(rows * row_bytes), rows, row_bytes};
          for (size_t r = 0; r < rows; ++r) {
            std::memcpy(plane.data.get() + r * row_bytes, frame.data[p] + static_cast<ptrdiff_t>(r) * frame.linesize[p],
                        row_bytes);
          }
          planes.push_back(std::move(plane));
        }
      });
    }
    nb::list result;
    for (Plane& plane : planes) {
      result.append(to_numpy(std::move(plane.data), {plane.rows, plane.row_bytes}));
    }
    return nb::list(nb::make_tuple(result, sample_bytes));
  }

 private:
  nb::object owner_;
  std::unique_ptr<VideoDecoder> decoder_;
  Converter converter_;
  std::mutex mutex_;
};

// A loader, in the process that made it. A forked process has none of its threads, and would wait for them wherever it
// asks something of the loader or frees it: there it is refused, and never freed.
class PyLoader {
 public:
  PyLoader(const ClipOptions& options, int num_threads)
      : process_(::getpid()), loader_(std::make_unique<ClipLoader>(options, num_threads)) {}
  ~PyLoader() {
    if (forked()) static_cast<void>(loader_.release());
  }
  PyLoader(const PyLoader&) = delete;
  PyLoader& operator=(const PyLoader&) = delete;

  ClipLoader& get() {
    if (forked()) {
      throw std::runtime_error("the threads of this ClipLoader stayed in the process that made it: make another here");
    }
    return *loader_;
  }
  int64_t clips_done() { return get().clips_done(); }
  void close() {
    if (!forked()) loader_->close();
  }

 private:
  bool forked() const { return ::getpid() != process_; }

  const pid_t process_;
  std::unique_ptr<ClipLoader> loader_;
};

ClipRequest to_request(const PySource& source, double start_seconds, std::optional<double> end_seconds, uint64_t seed) {
  return {source.source, start_seconds, end_seconds, seed};
}

}  // namespace

NB_MODULE(_core, m) {
  m.doc() = "FFmpeg decoder of pyvdl; use it through pyvdl.VideoDecoder, pyvdl.sample_clip and pyvdl.ClipLoader.";

  nb::register_exception_translator([](const std::exception_ptr& pointer, void*) {
    try {
      std::rethrow_exception(pointer);
    } catch (const Error& error) {
      // (stage, message): pyvdl.video adds the path and raises pyvdl.DecodeError.
      const nb::object type = nb::module_::import_("pyvdl.video").attr("DecodeError");
      const nb::object value = type(nb::none(), error.stage(), nb::str(error.what()));
      PyErr_SetObject(type.ptr(), value.ptr());
    }
  });

  // Of each library (version compiled against, version found at run time).
  m.def("ffmpeg_versions", [] {
    const auto text = [](unsigned v) {
      return std::to_string(v >> 16) + "." + std::to_string((v >> 8) & 0xff) + "." + std::to_string(v & 0xff);
    };
    nb::dict d;
    d["ffmpeg"] = nb::make_tuple(FFMPEG_VERSION, av_version_info());
    d["libavformat"] = nb::make_tuple(text(LIBAVFORMAT_VERSION_INT), text(avformat_version()));
    d["libavcodec"] = nb::make_tuple(text(LIBAVCODEC_VERSION_INT), text(avcodec_version()));
    d["libavutil"] = nb::make_tuple(text(LIBAVUTIL_VERSION_INT), text(avutil_version()));
    d["libswscale"] = nb::make_tuple(text(LIBSWSCALE_VERSION_INT), text(swscale_version()));
    return d;
  });

  nb::class_<PySource>(m, "Source")
      .def_static(
          "file",
          [](const nb::bytes& path, int64_t offset, int64_t length) {
            return PySource{{std::string(path.c_str(), path.size()), offset, length, {}}, nb::none()};
          },
          "path"_a, "offset"_a, "length"_a)
      .def_static(
          "memory",
          [](const nb::bytes& data) {
            return PySource{{{}, 0, -1, {reinterpret_cast<const uint8_t*>(data.c_str()), data.size()}}, data};
          },
          "data"_a);

  nb::class_<DecoderOptions>(m, "DecoderOptions")
      .def(
          "__init__",
          [](DecoderOptions* self, std::optional<int> stream, bool conceal, bool fast, int64_t max_pixels,
             int64_t max_frames, double max_seconds, int64_t max_bytes) {
            new (self) DecoderOptions{
                .stream = stream,
                .conceal = conceal,
                .fast = fast,
                .limits = {max_pixels, max_frames, max_seconds, max_bytes},
            };
          },
          nb::kw_only(), "stream"_a.none(), "conceal"_a, "fast"_a, "max_pixels"_a, "max_frames"_a, "max_seconds"_a,
          "max_bytes"_a);

  nb::enum_<Sampling>(m, "Sampling")
      .value("uniform", Sampling::uniform)
      .value("fps", Sampling::fps)
      .value("random", Sampling::random)
      .value("keyframe", Sampling::keyframe);
  nb::enum_<ShortClip>(m, "ShortClip")
      .value("repeat_last", ShortClip::repeat_last)
      .value("loop", ShortClip::loop)
      .value("error", ShortClip::error);
  nb::enum_<Crop>(m, "Crop").value("center", Crop::center).value("random", Crop::random).value("fixed", Crop::fixed);

  nb::class_<ClipOptions>(m, "ClipOptions")
      .def(
          "__init__",
          [](ClipOptions* self, const DecoderOptions& decoder, int num_frames, Sampling sampling, double fps,
             ShortClip short_clip, int short_side, int size, Crop crop, std::array<int, 4> rectangle,
             std::optional<std::array<double, 2>> scale_jitter, bool flip, std::optional<double> timeout_seconds) {
            new (self)
                ClipOptions{{.num_frames = num_frames, .sampling = sampling, .fps = fps, .short_clip = short_clip},
                            {short_side, size, crop, rectangle, scale_jitter, flip},
                            decoder,
                            timeout_seconds};
          },
          nb::kw_only(), "decoder"_a, "num_frames"_a, "sampling"_a, "fps"_a, "short_clip"_a, "short_side"_a, "size"_a,
          "crop"_a, "rectangle"_a, "scale_jitter"_a.none(), "flip"_a, "timeout_seconds"_a.none());

  nb::class_<PyDecoder>(m, "Decoder")
      .def(nb::init<const PySource&, const DecoderOptions&>(), "source"_a, "options"_a)
      .def("metadata", &PyDecoder::metadata)
      .def("stats", &PyDecoder::stats)
      .def("num_frames", &PyDecoder::num_frames)
      .def("pts_ticks", &PyDecoder::pts_ticks)
      .def("key_frames", &PyDecoder::key_frames)
      .def("pts_seconds", &PyDecoder::pts_seconds)
      .def("durations_seconds", &PyDecoder::durations_seconds)
      .def("frames", &PyDecoder::frames, "indices"_a)
      .def("planes", &PyDecoder::planes, "index"_a);

  m.def(
      "sample_clip",
      [](const PySource& source, double start_seconds, std::optional<double> end_seconds, uint64_t seed,
         const ClipOptions& options) {
        AlignedBytes data;
        const auto count = static_cast<size_t>(options.frames.num_frames);
        std::vector<double> pts(count), durations(count);
        {
          const nb::gil_scoped_release release;
          Converter converter;
          data = allocate_aligned(options.clip_bytes());
          sample_clip(to_request(source, start_seconds, end_seconds, seed), options, Deadline(options.timeout_seconds),
                      converter, data.get(), pts.data(), durations.data());
        }
        const auto height = static_cast<size_t>(options.view.out_height());
        const auto width = static_cast<size_t>(options.view.out_width());
        return nb::make_tuple(to_numpy(std::move(data), {count, height, width, 3}), to_numpy(std::move(pts)),
                              to_numpy(std::move(durations)));
      },
      "source"_a, "start_seconds"_a, "end_seconds"_a.none(), "seed"_a, "options"_a);

  nb::class_<PyLoader>(m, "ClipLoader")
      .def(nb::init<const ClipOptions&, int>(), "options"_a, "num_threads"_a)
      .def(
          "submit",
          [](PyLoader& self, const nb::list& clips) {
            std::vector<ClipRequest> requests;
            for (const nb::handle clip : clips) {
              const auto fields = nb::cast<nb::tuple>(clip);
              requests.push_back(to_request(nb::cast<const PySource&>(fields[0]), nb::cast<double>(fields[1]),
                                            nb::cast<std::optional<double>>(fields[2]), nb::cast<uint64_t>(fields[3])));
            }
            self.get().submit(std::move(requests));
          },
          "clips"_a)
      .def(
          "next",
          [](PyLoader& self, double patience_seconds) -> nb::object {
            ClipLoader& loader = self.get();
            std::unique_ptr<Batch> batch;
            {
              const nb::gil_scoped_release release;
              batch = loader.next(std::chrono::milliseconds(static_cast<int64_t>(patience_seconds * 1000)));
            }
            if (!batch) return nb::none();
            const ClipOptions& options = loader.options();
            const auto frames = static_cast<size_t>(options.frames.num_frames);
            const auto height = static_cast<size_t>(options.view.out_height());
            const auto width = static_cast<size_t>(options.view.out_width());
            return nb::make_tuple(to_numpy(std::move(batch->data), {batch->index.size(), frames, height, width, 3}),
                                  batch->errors, batch->index);
          },
          "patience_seconds"_a)
      .def("clips_done", &PyLoader::clips_done)
      .def("close", &PyLoader::close, nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace pyvdl
