// One open file: how it may be read, and whether it is still the file that was opened.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>

namespace specgate {

class OpenFile {
 public:
  /// Opens for reading, with O_DIRECT if `direct` and the file system allows it. Throws StoreFailure(Io) if
  /// it is missing, unreadable or no regular file.
  OpenFile(std::string path, bool direct);
  ~OpenFile();
  OpenFile(const OpenFile&) = delete;
  OpenFile& operator=(const OpenFile&) = delete;

  const std::string& path() const { return path_; }
  int descriptor() const { return descriptor_; }
  uint64_t size() const { return size_; }
  bool direct() const { return direct_.load(std::memory_order_relaxed); }
  /// Bytes to which the memory of a direct read must be aligned: what the kernel says, else 4096.
  uint32_t memory_alignment() const { return memory_alignment_.load(std::memory_order_relaxed); }

  /// The kernel refused memory of that alignment, or any direct read: never again.
  void align_memory_fully() { memory_alignment_.store(4096, std::memory_order_relaxed); }
  void stop_direct();
  /// No more reads; the rest may still be asked.
  void close();

  /// One sentence if the file was truncated, changed or replaced since it was opened, else empty. A file that
  /// was only removed still has its bytes, and that is fine.
  std::string changed() const;

 private:
  std::string path_;
  int descriptor_ = -1;
  uint64_t size_ = 0, device_ = 0, inode_ = 0;
  int64_t modified_s_ = 0, modified_ns_ = 0;
  std::atomic<bool> direct_{false};
  std::atomic<uint32_t> memory_alignment_{4096};
};

/// "Input/output error"; safe from any thread.
std::string errno_text(int error);

}  // namespace specgate
