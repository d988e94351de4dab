// One read on its way: what to ask of the kernel next, and what its answer means. Both engines drive it.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "file_reader.h"
#include "open_file.h"

namespace specgate {

/// Aligned buffers of one size, made when needed and kept.
class BufferPool {
 public:
  explicit BufferPool(std::size_t bytes) : bytes_(bytes) {}
  ~BufferPool();
  BufferPool(const BufferPool&) = delete;
  BufferPool& operator=(const BufferPool&) = delete;

  std::byte* take();  ///< nullptr if there is no memory
  void give(std::byte* buffer);

 private:
  const std::size_t bytes_;
  std::mutex mutex_;
  std::vector<std::byte*> free_;
};

/// What all reads of one reader share.
struct TransferContext {
  explicit TransferContext(const FileReader::Options& options_)
      : options(options_), buffers(options_.chunk) {}

  FileReader::Options options;
  std::vector<std::unique_ptr<OpenFile>> files;
  BufferPool buffers;
  std::atomic<uint64_t> reads{0}, direct_reads{0}, retries{0}, bytes{0}, bounced{0}, in_flight{0}, peak{0};

  void began();  // a read was given to the kernel
  void ended();
};

/// One call of pread, or one entry of io_uring.
struct Attempt {
  int descriptor = -1;
  uint64_t offset = 0, length = 0;
  std::byte* address = nullptr;
  bool direct = false;
  ReadFault fault;

  /// The kernel's answer as the fault, if there is one, wants it: what lies beyond its limit is spoiled.
  int64_t spoil(int64_t result) const;
};

struct Pending;  // the request that it is part of

class Transfer {
 public:
  Transfer(Pending* owner, int file, uint64_t offset, uint64_t length, std::byte* destination)
      : owner_(owner), destination_(destination), offset_(offset), length_(length), file_(file) {}

  Pending* owner() const { return owner_; }
  uint64_t length() const { return length_; }
  int file() const { return file_; }
  int stalls() const { return stalls_; }
  bool bounced() const { return buffer_ != nullptr; }
  bool whole() const { return whole_; }
  const std::string& error() const { return error_; }
  StoreFailure::Kind kind() const { return kind_; }
  uint32_t crc() const { return crc_; }

  /// Chooses how to read. False if that fails (no memory): then it has ended.
  bool begin(TransferContext& context);
  /// The next read to make.
  Attempt next(TransferContext& context);
  /// Takes the answer, bytes or -errno; true if it has ended: whole(), or with an error().
  bool landed(TransferContext& context, const Attempt& attempt, int64_t result);
  /// After the end, once, on any thread: copies, checks the sum if `sum`, gives the buffer back.
  void finish(TransferContext& context, bool sum);

 private:
  bool fail(const OpenFile& file, int error, uint64_t at);
  bool fall_back(TransferContext& context, OpenFile& file);
  std::string where(const OpenFile& file, uint64_t at) const;

  Pending* owner_;
  std::byte* destination_;
  std::byte* buffer_ = nullptr;   // aligned, if the read is not in place
  uint64_t offset_, length_;      // wanted
  uint64_t base_ = 0, span_ = 0;  // asked for: around the wanted bytes
  uint64_t progress_ = 0;         // bytes from base_ that have come
  int file_, stalls_ = 0;         // stalls: answers in a row that brought nothing
  bool direct_ = false, whole_ = false;
  uint32_t crc_ = 0;
  StoreFailure::Kind kind_ = StoreFailure::Kind::Io;
  std::string error_;
};

}  // namespace specgate
