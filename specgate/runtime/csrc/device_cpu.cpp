// The CPU "device": slots are plain memory, one thread is the copy engine.
#include <sys/mman.h>

#include <condition_variable>
#include <cstring>
#include <deque>
#include <mutex>
#include <thread>

#include "device.h"
#include "error.h"

namespace specgate {

namespace {

std::byte* map_memory(size_t bytes, const char* what) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) {
    throw StoreFailure(StoreFailure::Kind::Memory, std::to_string(bytes >> 20) + " MiB of " + what +
                                                       " were refused: lower budget_gb or host_gb");
  }
  madvise(memory, bytes, MADV_HUGEPAGE);
  return static_cast<std::byte*>(memory);
}

class CpuDevice final : public Device {
 public:
  explicit CpuDevice(int64_t) : engine_([this] { run(); }) {}
  ~CpuDevice() override { stop(); }

  bool is_cuda() const override { return false; }
  int ordinal() const override { return -1; }
  std::byte* allocate(size_t bytes) override { return map_memory(bytes, "slots"); }
  void free(std::byte* memory, size_t bytes) override { munmap(memory, bytes); }
  std::byte* allocate_host(size_t bytes) override { return map_memory(bytes, "host memory"); }
  void free_host(std::byte* memory, size_t bytes) override { munmap(memory, bytes); }
  void poison(std::byte* memory, size_t bytes, int64_t) override { std::memset(memory, 0xFF, bytes); }

  bool copy(CopyRequest request) override {
    {
      const std::lock_guard lock(mutex_);
      queue_.push_back(std::move(request));
    }
    changed_.notify_one();
    return true;
  }
  bool hurry(int64_t) override { return false; }

  void await(const std::vector<int64_t>&, uintptr_t) override {}
  void used(const std::vector<int64_t>&, uintptr_t) override {}
  bool issued_is_enough() const override { return false; }

  void stop() override {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    changed_.notify_all();
    if (engine_.joinable()) engine_.join();
  }

 private:
  void run() {
    std::unique_lock lock(mutex_);
    for (;;) {
      changed_.wait(lock, [this] { return stopping_ || !queue_.empty(); });
      if (queue_.empty()) return;
      CopyRequest request = std::move(queue_.front());
      queue_.pop_front();
      lock.unlock();
      JobStatus status = JobStatus::Ok;
      std::string error;
      try {
        decode_block(*request.format, request.from, request.slot);
      } catch (const std::exception& problem) {
        status = JobStatus::Failed;
        error = problem.what();
      }
      request.done(status, std::move(error));
      lock.lock();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<CopyRequest> queue_;
  bool stopping_ = false;
  std::thread engine_;  // last: it uses the others
};

}  // namespace

std::unique_ptr<Device> make_cpu_device(int64_t slots) { return std::make_unique<CpuDevice>(slots); }

#ifndef SPECGATE_CUDA
int cuda_devices() { return 0; }
#endif

}  // namespace specgate
