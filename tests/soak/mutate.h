// Random changes of a file's bytes. The seed decides: what was found can be made again.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include "sampling.h"

namespace pyvdl {

using FileBytes = std::vector<uint8_t>;

inline FileBytes read_file(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) throw std::runtime_error("cannot read " + path.string());
  return {std::istreambuf_iterator<char>(in), {}};
}

// The files of a folder, by name: the order of a directory differs between machines.
inline std::vector<std::filesystem::path> files_of(const std::filesystem::path& folder) {
  std::vector<std::filesystem::path> files;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) files.push_back(entry.path());
  std::sort(files.begin(), files.end());
  if (files.empty()) throw std::runtime_error("no file in " + folder.string());
  return files;
}

// Changes `bytes` in one place; bytes before `first` stay. `other` lends chunks.
inline void mutate(FileBytes& bytes, size_t first, const FileBytes& other, Random& random) {
  if (bytes.size() <= first) return;
  const auto below = [&](size_t bound) { return static_cast<size_t>(random.below(static_cast<int64_t>(bound))); };
  const size_t length = bytes.size() - first;
  // Half of the changes go to the ends, where containers keep their tables.
  const size_t window = std::min<size_t>(length, 1024);
  const size_t places[] = {below(length), below(length), below(window), length - 1 - below(window)};
  const size_t at = first + places[below(4)];
  const size_t chunk = std::min(bytes.size() - at, size_t{1} << below(11));
  const auto from = bytes.begin() + static_cast<ptrdiff_t>(at);
  const auto to = from + static_cast<ptrdiff_t>(chunk);
  switch (below(10)) {
    case 0:
      bytes[at] ^= static_cast<uint8_t>(1 << below(8));
      break;
    case 1:
    case 2:
      bytes[at] = static_cast<uint8_t>(random.next());
      break;
    case 3: {  // a number at the edge of its range, in either byte order
      const uint64_t edges[] = {0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF};
      const uint64_t value = edges[below(std::size(edges))] + below(3) - 1;
      const size_t width = std::min(bytes.size() - at, size_t{1} << below(4));
      const bool big_endian = below(2);
      for (size_t i = 0; i < width; ++i) {
        bytes[at + i] = static_cast<uint8_t>(value >> (8 * (big_endian ? width - 1 - i : i)));
      }
      break;
    }
    case 4:
      std::fill(from, to, static_cast<uint8_t>(below(2) ? 0 : random.next()));
      break;
    case 5:
      bytes.erase(from, to);
      break;
    case 6: {  // a chunk twice
      const FileBytes copy(from, to);
      bytes.insert(from, copy.begin(), copy.end());
      break;
    }
    case 7: {  // a chunk from elsewhere in the same file
      const size_t source = first + below(length);
      const FileBytes copy(bytes.begin() + static_cast<ptrdiff_t>(source),
                           bytes.begin() + static_cast<ptrdiff_t>(std::min(bytes.size(), source + chunk)));
      std::copy_n(copy.begin(), std::min(chunk, copy.size()), from);
      break;
    }
    case 8: {  // the end from another file
      const size_t source = below(other.size());
      bytes.erase(from, bytes.end());
      bytes.insert(bytes.end(), other.begin() + static_cast<ptrdiff_t>(source), other.end());
      break;
    }
    default:
      bytes.resize(at);
  }
}

}  // namespace pyvdl
