// What the tests of the file tier share: files of known bytes, a reader that collects its reports, counts of
// threads and descriptors.
#pragma once

#include <fcntl.h>
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "file_reader.h"

namespace specgate::test {

using Bytes = std::vector<unsigned char>;
using Options = FileReader::Options;

/// Byte `position` of the file with that seed.
inline unsigned char byte_of(uint64_t seed, uint64_t position) {
  uint64_t x = (seed << 48) + position / 8 + 1;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return static_cast<unsigned char>(((x ^ (x >> 31)) >> (8 * (position % 8))) & 255);
}

inline Bytes bytes_of(uint64_t seed, uint64_t offset, uint64_t length) {
  Bytes bytes(length);
  for (uint64_t i = 0; i < length; ++i) bytes[i] = byte_of(seed, offset + i);
  return bytes;
}

/// A directory that goes away.
class Folder {
 public:
  explicit Folder(const std::filesystem::path& parent = std::filesystem::temp_directory_path()) {
    std::string name = (parent / "specgate-XXXXXX").string();
    CHECK(::mkdtemp(name.data()) != nullptr);
    path_ = name;
  }
  ~Folder() { std::filesystem::remove_all(path_); }

  std::string file(const std::string& name, uint64_t seed, uint64_t size) const {
    const std::string path = (path_ / name).string();
    const Bytes bytes = bytes_of(seed, 0, size);
    std::ofstream(path, std::ios::binary).write(reinterpret_cast<const char*>(bytes.data()), bytes.size());
    return path;
  }
  std::string path(const std::string& name) const { return (path_ / name).string(); }

 private:
  std::filesystem::path path_;
};

/// Memory at a chosen remainder to 4096, with a pattern all over it, which tells what was written.
class Memory {
 public:
  explicit Memory(std::size_t size, std::size_t remainder = 0) : size_(size) {
    base_ = static_cast<std::byte*>(std::aligned_alloc(4096, size / 4096 * 4096 + 2 * 4096));
    clear(remainder);
  }
  ~Memory() { std::free(base_); }
  Memory(const Memory&) = delete;

  /// The pattern again, at another remainder below 4096.
  void clear(std::size_t remainder = 0) {
    data_ = base_ + remainder;
    std::memset(data_, 0x5C, size_);
  }
  std::byte* data() { return data_; }
  std::size_t size() const { return size_; }
  Bytes copy() const {
    const auto* begin = reinterpret_cast<const unsigned char*>(data_);
    return Bytes(begin, begin + size_);
  }

 private:
  std::size_t size_;
  std::byte *base_, *data_;
};

/// A FileReader whose reports are counted and kept.
class Collector {
 public:
  Collector(std::vector<std::string> paths, Options options) {
    reader = std::make_unique<FileReader>(std::move(paths), options, [this](ReadResult&& result) {
      const std::lock_guard lock(mutex_);
      ++times_[result.id];
      results_[result.id] = std::move(result);
      changed_.notify_all();
    });
  }

  ReadResult wait(uint64_t id) {
    std::unique_lock lock(mutex_);
    const bool came =
        changed_.wait_for(lock, std::chrono::seconds(60), [&] { return times_.count(id) != 0; });
    CHECK(came);
    return came ? results_[id] : ReadResult{};
  }
  ReadResult read(uint64_t id, std::vector<Segment> segments, Memory& memory,
                  std::optional<uint32_t> crc = {}) {
    reader->submit({id, std::move(segments), memory.data(), memory.size(), crc});
    return wait(id);
  }
  std::map<uint64_t, int> times() {
    const std::lock_guard lock(mutex_);
    return times_;
  }
  std::map<uint64_t, ReadResult> results() {
    const std::lock_guard lock(mutex_);
    return results_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<uint64_t, int> times_;
  std::map<uint64_t, ReadResult> results_;

 public:
  std::unique_ptr<FileReader> reader;  // last: its threads use the rest
};

/// A door that reads wait at, for tests that need a moment to stand still.
class Gate {
 public:
  void pass() {
    std::unique_lock lock(mutex_);
    ++waiting_;
    changed_.notify_all();
    changed_.wait(lock, [this] { return open_; });
  }
  void await(int waiting) {
    std::unique_lock lock(mutex_);
    CHECK(changed_.wait_for(lock, std::chrono::seconds(60), [&] { return waiting_ >= waiting; }));
  }
  void open() {
    const std::lock_guard lock(mutex_);
    open_ = true;
    changed_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  int waiting_ = 0;
  bool open_ = false;
};

inline std::size_t entries_of(const char* folder) {
  std::size_t count = 0;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) count += !entry.path().empty();
  return count;
}

/// Threads and descriptors of this process; the kernel takes a moment to end a ring's workers.
inline bool returns_to(std::size_t threads, std::size_t descriptors) {
  for (int i = 0; i < 1000; ++i) {
    if (entries_of("/proc/self/task") == threads && entries_of("/proc/self/fd") == descriptors) return true;
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  return false;
}

/// The backends that this machine has.
inline std::vector<Options::Backend> backends() {
  Folder folder;
  Options options;
  options.backend = Options::Auto;
  const FileReader reader({folder.file("x", 1, 1)}, options, [](ReadResult&&) {});
  if (std::string(reader.backend()) == "io_uring") return {Options::Uring, Options::Pread};
  std::printf("only pread: %s\n", reader.fallback().c_str());
  return {Options::Pread};
}

}  // namespace specgate::test
