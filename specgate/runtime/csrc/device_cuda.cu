// The CUDA device: slots in device memory, pinned host memory, two copy streams, events both ways.
//
// Demand copies have a stream of their own with the higher priority, so that they never stand behind speculation.
// A compute stream waits on the event of a copy; a copy waits on the event of the last kernels that used its slot.
#include <cuda_runtime.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <cstring>
#include <deque>
#include <mutex>
#include <thread>

#include "device.h"
#include "error.h"

namespace specgate {

namespace {

constexpr size_t kStagingParts = 4;   // encoded blocks on the device that wait for their decoding, per stream
constexpr size_t kReleaseEvents = 512;

void require(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // do not leave it for the next caller
  throw StoreFailure(StoreFailure::Kind::Memory,
                     std::string(what) + " failed: " + cudaGetErrorString(status) + "; see `specgate doctor`");
}

/// Makes the device current for the calling thread while it lives.
class Current {
 public:
  explicit Current(int ordinal) {
    cudaGetDevice(&before_);
    if (before_ != ordinal) cudaSetDevice(ordinal);
    ordinal_ = ordinal;
  }
  ~Current() {
    if (before_ != ordinal_) cudaSetDevice(before_);
  }

 private:
  int before_ = 0, ordinal_ = 0;
};

/// Prefers the NUMA node of the card for memory allocated while it lives (no libnuma; ignored where refused).
class NearCard {
 public:
  explicit NearCard(int ordinal) {
    char bus[32] = {0};
    if (cudaDeviceGetPCIBusId(bus, sizeof(bus), ordinal) != cudaSuccess) return;
    for (char* c = bus; *c; ++c) *c = static_cast<char>(std::tolower(*c));
    const std::string path = std::string("/sys/bus/pci/devices/") + bus + "/numa_node";
    FILE* file = std::fopen(path.c_str(), "r");
    int node = -1;
    if (file) {
      if (std::fscanf(file, "%d", &node) != 1) node = -1;
      std::fclose(file);
    }
    if (node < 0 || node >= 64) return;
    unsigned long mask = 1UL << node;
    set_ = syscall(SYS_set_mempolicy, 1 /* MPOL_PREFERRED */, &mask, 64UL) == 0;
  }
  ~NearCard() {
    if (set_) syscall(SYS_set_mempolicy, 0 /* MPOL_DEFAULT */, nullptr, 0UL);
  }

 private:
  bool set_ = false;
};

struct Lane {
  cudaStream_t stream = nullptr;
  std::vector<std::byte*> staging;
  size_t staging_bytes = 0, next = 0;
};

class CudaDevice final : public Device {
 public:
  CudaDevice(int ordinal, int64_t slots) : ordinal_(ordinal), ready_(slots), last_use_(slots, -1) {
    const Current current(ordinal_);
    int least = 0, greatest = 0;
    require(cudaDeviceGetStreamPriorityRange(&least, &greatest), "asking for stream priorities");
    require(cudaStreamCreateWithPriority(&lanes_[0].stream, cudaStreamNonBlocking, greatest), "making a stream");
    require(cudaStreamCreateWithPriority(&lanes_[1].stream, cudaStreamNonBlocking, least), "making a stream");
    for (cudaEvent_t& event : ready_) {
      require(cudaEventCreateWithFlags(&event, cudaEventDisableTiming | cudaEventBlockingSync), "making an event");
    }
    released_.resize(kReleaseEvents);
    for (cudaEvent_t& event : released_) {
      require(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "making an event");
    }
    watchers_[0] = std::thread([this] { watch(0); });
    watchers_[1] = std::thread([this] { watch(1); });
  }

  ~CudaDevice() override {
    stop();
    const Current current(ordinal_);
    for (Lane& lane : lanes_) {
      for (std::byte* part : lane.staging) cudaFree(part);
      cudaStreamDestroy(lane.stream);
    }
    for (cudaEvent_t event : ready_) cudaEventDestroy(event);
    for (cudaEvent_t event : released_) cudaEventDestroy(event);
  }

  bool is_cuda() const override { return true; }
  int ordinal() const override { return ordinal_; }
  bool issued_is_enough() const override { return true; }

  std::byte* allocate(size_t bytes) override {
    const Current current(ordinal_);
    void* memory = nullptr;
    const cudaError_t status = cudaMalloc(&memory, bytes);
    if (status != cudaSuccess) {
      cudaGetLastError();
      size_t free_bytes = 0, total = 0;
      cudaMemGetInfo(&free_bytes, &total);
      throw StoreFailure(StoreFailure::Kind::Memory,
                         std::to_string(bytes >> 20) + " MiB of device memory were refused, " +
                             std::to_string(free_bytes >> 20) + " MiB are free: lower budget_gb");
    }
    return static_cast<std::byte*>(memory);
  }

  void free(std::byte* memory, size_t) override {
    const Current current(ordinal_);
    cudaFree(memory);
  }

  std::byte* allocate_host(size_t bytes) override {
    const Current current(ordinal_);
    const NearCard near(ordinal_);
    void* memory = nullptr;
    if (cudaHostAlloc(&memory, bytes, cudaHostAllocPortable) != cudaSuccess) {
      cudaGetLastError();
      throw StoreFailure(StoreFailure::Kind::Memory, std::to_string(bytes >> 20) +
                                                         " MiB of pinned host memory were refused: lower host_gb, or "
                                                         "raise the limit on locked memory (ulimit -l)");
    }
    return static_cast<std::byte*>(memory);
  }

  void free_host(std::byte* memory, size_t) override {
    const Current current(ordinal_);
    cudaFreeHost(memory);
  }

  void poison(std::byte* memory, size_t bytes, int64_t slot_key) override {
    const Current current(ordinal_);
    const std::lock_guard lock(mutex_);
    if (slot_key >= 0) after_last_use(slot_key, lanes_[0].stream);
    require(cudaMemsetAsync(memory, 0xFF, bytes, lanes_[0].stream), "poisoning a slot");
    require(cudaStreamSynchronize(lanes_[0].stream), "poisoning a slot");
  }

  void copy(CopyRequest request) override {
    const Current current(ordinal_);
    const int lane_number = static_cast<int>(request.level);
    {
      const std::lock_guard lock(mutex_);
      Lane& lane = lanes_[lane_number];
      after_last_use(request.slot_key, lane.stream);
      const BlockFormat& format = *request.format;
      cudaError_t status = cudaSuccess;
      if (is_plain(format)) {
        status = cudaMemcpyAsync(request.slot, request.from, format.block_bytes, cudaMemcpyHostToDevice, lane.stream);
      } else {
        std::byte* part = staging(lane, format.block_bytes);
        status = cudaMemcpyAsync(part, request.from, format.block_bytes, cudaMemcpyHostToDevice, lane.stream);
        if (status == cudaSuccess) decode_block_cuda(format, part, request.slot, lane.stream);
      }
      if (status == cudaSuccess) status = cudaEventRecord(ready_[request.slot_key], lane.stream);
      if (status != cudaSuccess) cudaGetLastError();
      flying_[lane_number].push_back({std::move(request), status});
    }
    changed_[lane_number].notify_one();
  }

  void await(const std::vector<int64_t>& slot_keys, uintptr_t stream) override {
    const Current current(ordinal_);
    const std::lock_guard lock(mutex_);
    for (const int64_t key : slot_keys) {
      require(cudaStreamWaitEvent(reinterpret_cast<cudaStream_t>(stream), ready_[key], 0), "waiting for a copy");
    }
  }

  void used(const std::vector<int64_t>& slot_keys, uintptr_t stream) override {
    const Current current(ordinal_);
    const std::lock_guard lock(mutex_);
    const size_t place = next_release_++ % kReleaseEvents;
    if (next_release_ > kReleaseEvents) {  // long past: hardly ever waits
      require(cudaEventSynchronize(released_[place]), "reusing an event");
    }
    require(cudaEventRecord(released_[place], reinterpret_cast<cudaStream_t>(stream)), "recording an event");
    for (const int64_t key : slot_keys) last_use_[key] = static_cast<int64_t>(next_release_ - 1);
  }

  void stop() override {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    for (int i = 0; i < 2; ++i) {
      changed_[i].notify_all();
      if (watchers_[i].joinable()) watchers_[i].join();
    }
  }

 private:
  struct Flying {
    CopyRequest request;
    cudaError_t status;
  };

  /// The stream waits for the last kernels that used the slot. (mutex_ is held)
  void after_last_use(int64_t slot_key, cudaStream_t stream) {
    const int64_t use = last_use_[slot_key];
    if (use < 0) return;
    // an event that was reused since had been completed before
    if (next_release_ - static_cast<size_t>(use) <= kReleaseEvents) {
      require(cudaStreamWaitEvent(stream, released_[static_cast<size_t>(use) % kReleaseEvents], 0), "ordering a copy");
    }
    last_use_[slot_key] = -1;
  }

  /// A place on the device for an encoded block; the stream's own order protects the one before. (mutex_ is held)
  std::byte* staging(Lane& lane, size_t bytes) {
    if (lane.staging_bytes < bytes) {
      require(cudaStreamSynchronize(lane.stream), "growing the staging memory");
      for (std::byte* part : lane.staging) cudaFree(part);
      lane.staging.clear();
      for (size_t i = 0; i < kStagingParts; ++i) {
        void* memory = nullptr;
        require(cudaMalloc(&memory, bytes), "allocating staging memory on the device");
        lane.staging.push_back(static_cast<std::byte*>(memory));
      }
      lane.staging_bytes = bytes;
    }
    return lane.staging[lane.next++ % kStagingParts];
  }

  /// Reports finished copies of one lane, in order.
  void watch(int lane) {
    const Current current(ordinal_);
    std::unique_lock lock(mutex_);
    for (;;) {
      changed_[lane].wait(lock, [&] { return stopping_ || !flying_[lane].empty(); });
      if (flying_[lane].empty()) return;
      Flying flying = std::move(flying_[lane].front());
      flying_[lane].pop_front();
      lock.unlock();
      cudaError_t status = flying.status;
      if (status == cudaSuccess) status = cudaEventSynchronize(ready_[flying.request.slot_key]);
      const bool good = status == cudaSuccess;
      flying.request.done(good ? JobStatus::Ok : JobStatus::Failed,
                          good ? "" : std::string("a copy to the device failed: ") + cudaGetErrorString(status));
      lock.lock();
    }
  }

  int ordinal_;
  std::mutex mutex_;
  Lane lanes_[2];  // by level
  std::vector<cudaEvent_t> ready_;     // per slot: the copy into it
  std::vector<cudaEvent_t> released_;  // ring: the ends of uses
  std::vector<int64_t> last_use_;      // per slot: number of the use, -1 none
  size_t next_release_ = 0;
  std::deque<Flying> flying_[2];
  std::condition_variable changed_[2];
  bool stopping_ = false;
  std::thread watchers_[2];
};

}  // namespace

std::unique_ptr<Device> make_cuda_device(int ordinal, int64_t slots) {
  return std::make_unique<CudaDevice>(ordinal, slots);
}

int cuda_devices() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return count;
}

}  // namespace specgate
