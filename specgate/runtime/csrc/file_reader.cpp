#include "file_reader.h"

#include <unistd.h>

#include <system_error>

#include "pread_pool.h"
#include "read_plan.h"
#include "read_queue.h"
#include "uring.h"

namespace specgate {
namespace {

template <class T>
void require(bool good, const char* name, T value, const char* remedy) {
  if (good) return;
  throw StoreFailure(StoreFailure::Kind::Config, std::string("the file reader's ") + name + " is " +
                                                     std::to_string(value) + ": " + remedy);
}

void check(const FileReader::Options& options) {
  require(options.depth >= 1 && options.depth <= 4096, "depth", options.depth, "choose 1 to 4096");
  require(options.threads >= 1 && options.threads <= 256, "threads", options.threads, "choose 1 to 256");
  require(options.chunk >= kPage && options.chunk <= (1u << 30) && options.chunk % kPage == 0, "chunk",
          options.chunk, "choose a multiple of 4096 bytes up to 1 GiB");
}

}  // namespace

FileReader::FileReader(std::vector<std::string> paths, Options options, Done done) : process_(::getpid()) {
  check(options);
  queue_ = std::make_unique<ReadQueue>(paths, options, std::move(done));
  try {
    if (options.backend != Options::Pread) {
      engine_ = UringEngine::make(*queue_, options.depth, options.threads, fallback_);
      if (engine_ == nullptr && options.backend == Options::Uring) {
        throw StoreFailure(StoreFailure::Kind::Config, "the file reader cannot use io_uring here, " +
                                                           fallback_ + ": choose auto or pread");
      }
    }
    if (engine_ == nullptr) engine_ = std::make_unique<PreadPool>(*queue_, options.threads);
  } catch (const std::system_error& error) {
    throw StoreFailure(StoreFailure::Kind::Memory, std::string("the file reader cannot start its threads (") +
                                                       error.what() + "): use fewer, or raise ulimit -u");
  }
}

FileReader::~FileReader() {
  close();
  if (process_ == ::getpid()) return;
  static_cast<void>(engine_.release());
  static_cast<void>(queue_.release());
}

void FileReader::submit(ReadRequest request) {
  queue_->submit(std::move(request));
  engine_->wake();
}

bool FileReader::cancel(uint64_t id) {
  const bool cancelled = queue_->cancel(id);
  if (cancelled) engine_->wake();
  return cancelled;
}

void FileReader::close() {
  if (process_ != ::getpid()) return;  // there is nobody to wait for
  std::call_once(closed_, [this] {
    queue_->close();
    engine_->wake();
    engine_->stop();
    queue_->close_files();
  });
}

ReadStats FileReader::stats() const { return queue_->stats(); }
const char* FileReader::backend() const { return engine_->name(); }
const std::string& FileReader::fallback() const { return fallback_; }
bool FileReader::direct(int file) const { return queue_->file(file).direct(); }
uint64_t FileReader::size(int file) const { return queue_->file(file).size(); }

}  // namespace specgate
