#include "open_file.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <bit>
#include <cerrno>
#include <system_error>

#include "error.h"

namespace specgate {
namespace {

[[noreturn]] void refuse(const std::string& path, int error) {
  std::string text = "cannot open '" + path + "' (" + errno_text(error) + "): ";
  if (error == EMFILE || error == ENFILE) {
    text += "raise the limit on open files (ulimit -n)";
  } else if (error == EACCES || error == EPERM) {
    text += "make it readable";
  } else {
    text += "check the path, or make the file again";
  }
  throw StoreFailure(StoreFailure::Kind::Io, text);
}

int open_retrying(const char* path, int flags) {
  for (;;) {
    const int descriptor = ::open(path, flags);
    if (descriptor >= 0 || errno != EINTR) return descriptor;
  }
}

void clear_flag(int descriptor, int flag) {
  const int flags = ::fcntl(descriptor, F_GETFL);
  if (flags >= 0) ::fcntl(descriptor, F_SETFL, flags & ~flag);
}

/// File systems that lie in memory take O_DIRECT and copy all the same, where the read is made.
bool in_memory(int descriptor) {
  struct statfs info{};
  if (::fstatfs(descriptor, &info) != 0) return false;
  const auto type = static_cast<uint64_t>(info.f_type);
  return type == TMPFS_MAGIC || type == RAMFS_MAGIC || type == HUGETLBFS_MAGIC;
}

/// Alignment of memory for direct reads as statx tells (Linux 6.1), 0 if direct reads are refused, 4096 if
/// unknown.
uint32_t direct_alignment([[maybe_unused]] int descriptor) {
#ifdef STATX_DIOALIGN
  struct statx info{};
  if (::statx(descriptor, "", AT_EMPTY_PATH, STATX_DIOALIGN, &info) == 0 &&
      (info.stx_mask & STATX_DIOALIGN)) {
    const uint32_t memory = info.stx_dio_mem_align, offset = info.stx_dio_offset_align;
    if (memory == 0 || memory > 4096 || offset > 4096 || !std::has_single_bit(memory)) return 0;
    return memory;
  }
#endif
  return 4096;
}

}  // namespace

std::string errno_text(int error) { return std::generic_category().message(error); }

OpenFile::OpenFile(std::string path, bool direct) : path_(std::move(path)) {
  const int flags = O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK;  // a FIFO would wait for its writer
  if (direct) descriptor_ = open_retrying(path_.c_str(), flags | O_DIRECT);
  const bool refused = direct && descriptor_ < 0 && errno == EINVAL;
  if (!direct || refused) descriptor_ = open_retrying(path_.c_str(), flags);
  if (descriptor_ < 0) refuse(path_, errno);
  struct stat info{};
  const int error = ::fstat(descriptor_, &info) == 0 ? 0 : errno;
  if (error != 0 || !S_ISREG(info.st_mode)) {
    ::close(descriptor_);
    if (error != 0) refuse(path_, error);
    throw StoreFailure(StoreFailure::Kind::Io,
                       "'" + path_ + "' is not a regular file: give the path of a file");
  }
  clear_flag(descriptor_, O_NONBLOCK);
  size_ = static_cast<uint64_t>(info.st_size);
  device_ = info.st_dev;
  inode_ = info.st_ino;
  modified_s_ = info.st_mtim.tv_sec;
  modified_ns_ = info.st_mtim.tv_nsec;
  direct_ = direct && !refused;
  if (direct_) {
    const uint32_t alignment = in_memory(descriptor_) ? 0 : direct_alignment(descriptor_);
    if (alignment != 0)
      memory_alignment_ = alignment;
    else
      stop_direct();
  }
}

OpenFile::~OpenFile() { close(); }

void OpenFile::close() {
  if (descriptor_ >= 0) ::close(descriptor_);
  descriptor_ = -1;
}

void OpenFile::stop_direct() {
  // Reads under way are not touched: the kernel looks at the flag when a read begins.
  clear_flag(descriptor_, O_DIRECT);
  direct_.store(false, std::memory_order_relaxed);
}

std::string OpenFile::changed() const {
  struct stat now{};
  if (::fstat(descriptor_, &now) != 0) return {};
  const uint64_t size = static_cast<uint64_t>(now.st_size);
  if (size < size_) {
    return "'" + path_ + "' was truncated while open (from " + std::to_string(size_) + " to " +
           std::to_string(size) + " bytes): restore it, then open it again";
  }
  if (size != size_ || now.st_mtim.tv_sec != modified_s_ || now.st_mtim.tv_nsec != modified_ns_) {
    return "'" + path_ + "' was changed while open (somebody wrote to it): open it again once it is whole";
  }
  if (::stat(path_.c_str(), &now) == 0 && (now.st_ino != inode_ || now.st_dev != device_)) {
    return "'" + path_ + "' was replaced while open (another file has its name now): open it again";
  }
  return {};
}

}  // namespace specgate
