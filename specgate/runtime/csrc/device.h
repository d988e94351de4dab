// The device tier: slots that kernels read, and the engine that fills them. A CPU and a CUDA version.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "codec.h"
#include "ledger.h"

namespace specgate {

/// An encoded block on its way from host memory to a slot.
struct CopyRequest {
  const BlockFormat* format;
  const std::byte* from;  ///< encoded block; must stay until `done`
  std::byte* slot;
  int64_t slot_key;  ///< numbers all slots of all arenas
  Level level;
  std::function<void()> issued;                      ///< from a thread of the device, if copy() returned false
  std::function<void(JobStatus, std::string)> done;  ///< from a thread of the device, exactly once, after `issued`
};

/// Memory of one kind that goes back to the system with its owner.
class Device {
 public:
  virtual ~Device() = default;
  virtual bool is_cuda() const = 0;
  virtual int ordinal() const = 0;

  /// Device memory for slots. Throws StoreFailure(Memory) naming the size when it is refused.
  virtual std::byte* allocate(size_t bytes) = 0;
  virtual void free(std::byte* memory, size_t bytes) = 0;
  /// Host memory that the copy engine reads at full speed (pinned where there is CUDA).
  virtual std::byte* allocate_host(size_t bytes) = 0;
  virtual void free_host(std::byte* memory, size_t bytes) = 0;
  /// Fills with 0xFF, which is NaN in every floating-point format, after all work that reads it.
  virtual void poison(std::byte* memory, size_t bytes, int64_t slot_key) = 0;

  /// Starts a transfer and returns at once. Work on compute streams that used the slot before finishes first.
  /// True: await() may be called for the slot from now on; false: once `issued` was called.
  virtual bool copy(CopyRequest request) = 0;
  /// Somebody waits for this slot: what is left of its transfer goes now. True: await() may be called for it, and
  /// `issued` will not be called.
  virtual bool hurry(int64_t slot_key) = 0;
  /// Kernels launched on `stream` from now on run after the copies into these slots. The host does not wait.
  virtual void await(const std::vector<int64_t>& slot_keys, uintptr_t stream) = 0;
  /// Kernels launched on `stream` until now are the last that use these slots.
  virtual void used(const std::vector<int64_t>& slot_keys, uintptr_t stream) = 0;
  /// Whether a caller may go on once copies are issued (CUDA) or only once they are done (CPU).
  virtual bool issued_is_enough() const = 0;
  /// Waits for all transfers; then no `done` is called any more.
  virtual void stop() = 0;
};

/// `slots`: of all arenas together.
std::unique_ptr<Device> make_cpu_device(int64_t slots);
#ifdef SPECGATE_CUDA
/// `piece_bytes`: forecast blocks are copied in pieces of so many, between which a demand goes first; 0: whole.
std::unique_ptr<Device> make_cuda_device(int ordinal, int64_t slots, size_t piece_bytes);
#endif
/// How many CUDA devices there are; 0 without a driver or in a build without CUDA.
int cuda_devices();

}  // namespace specgate
