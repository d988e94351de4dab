// The Ring: what uring.h asks of the kernel.
#include <errno.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <cstring>
#include <thread>

#include "uring.h"

#if defined(__linux__) && __has_include(<linux/io_uring.h>)
#include <linux/io_uring.h>
#endif

// IORING_OP_READ and the probe are of Linux 5.6, as is this flag: older headers are as good as none.
#if defined(IORING_FEAT_RW_CUR_POS) && defined(SYS_io_uring_setup)

namespace specgate {

namespace {

uint32_t load(const uint32_t* shared) { return __atomic_load_n(shared, __ATOMIC_ACQUIRE); }
void store(uint32_t* shared, uint32_t value) { __atomic_store_n(shared, value, __ATOMIC_RELEASE); }

void* map(std::size_t bytes, int descriptor, uint64_t offset) {
  void* const address = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, descriptor,
                               static_cast<off_t>(offset));
  return address == MAP_FAILED ? nullptr : address;
}

/// Whether the kernel knows the operations used here.
bool knows_operations(int descriptor) {
  constexpr unsigned kOperations = 64;
  alignas(io_uring_probe) char memory[sizeof(io_uring_probe) + kOperations * sizeof(io_uring_probe_op)] = {};
  auto* const probe = reinterpret_cast<io_uring_probe*>(memory);
  if (::syscall(SYS_io_uring_register, descriptor, IORING_REGISTER_PROBE, probe, kOperations) != 0)
    return false;
  const auto known = [&](unsigned operation) {
    return operation < probe->ops_len && (probe->ops[operation].flags & IO_URING_OP_SUPPORTED) != 0;
  };
  return known(IORING_OP_NOP) && known(IORING_OP_READ) && known(IORING_OP_POLL_ADD) &&
         known(IORING_OP_ASYNC_CANCEL);
}

}  // namespace

std::unique_ptr<Ring> Ring::make(unsigned entries, std::string& why) {
  io_uring_params params{};
  params.flags = IORING_SETUP_CLAMP;
  const long descriptor = ::syscall(SYS_io_uring_setup, std::bit_ceil(entries), &params);
  if (descriptor < 0) {
    why = "io_uring_setup failed (" + errno_text(errno) + ")";
    return nullptr;
  }
  std::unique_ptr<Ring> ring(new Ring);
  ring->descriptor_ = static_cast<int>(descriptor);
  const uint32_t needed = IORING_FEAT_SINGLE_MMAP | IORING_FEAT_NODROP;
  if ((params.features & needed) != needed || !knows_operations(ring->descriptor_)) {
    why = "this kernel's io_uring is older than Linux 5.6";
    return nullptr;
  }
  ring->rings_bytes_ = std::max<std::size_t>(params.sq_off.array + params.sq_entries * sizeof(uint32_t),
                                             params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe));
  ring->entries_bytes_ = params.sq_entries * sizeof(io_uring_sqe);
  ring->rings_ = map(ring->rings_bytes_, ring->descriptor_, IORING_OFF_SQ_RING);
  ring->entries_ = map(ring->entries_bytes_, ring->descriptor_, IORING_OFF_SQES);
  if (ring->rings_ == nullptr || ring->entries_ == nullptr) {
    why = "no memory for the queues of io_uring (" + errno_text(errno) + ")";
    return nullptr;
  }
  auto* const base = static_cast<char*>(ring->rings_);
  const auto at = [&](uint32_t offset) { return reinterpret_cast<uint32_t*>(base + offset); };
  ring->sq_head_ = at(params.sq_off.head);
  ring->sq_tail_ = at(params.sq_off.tail);
  ring->sq_array_ = at(params.sq_off.array);
  ring->sq_mask_ = *at(params.sq_off.ring_mask);
  ring->sq_size_ = params.sq_entries;
  ring->cq_head_ = at(params.cq_off.head);
  ring->cq_tail_ = at(params.cq_off.tail);
  ring->cq_mask_ = *at(params.cq_off.ring_mask);
  ring->completions_ = base + params.cq_off.cqes;
  // A sandbox may allow the set-up and refuse the rest: one empty round trip shows.
  ring->nop(1);
  uint64_t tag = 0;
  int32_t result = 0;
  const int error = -ring->enter(true);
  if (error != 0 || !ring->next(tag, result) || tag != 1 || result != 0) {
    why = "io_uring_enter failed (" + errno_text(error != 0 ? error : EIO) + ")";
    return nullptr;
  }
  return ring;
}

Ring::~Ring() {
  if (entries_ != nullptr) ::munmap(entries_, entries_bytes_);
  if (rings_ != nullptr) ::munmap(rings_, rings_bytes_);
  if (descriptor_ >= 0) ::close(descriptor_);
}

void* Ring::entry(uint8_t operation, int descriptor, uint64_t tag) {
  while (*sq_tail_ - load(sq_head_) == sq_size_ && enter(false) == 0) {
  }
  const uint32_t tail = *sq_tail_, index = tail & sq_mask_;  // only this thread writes the tail
  auto* const made = static_cast<io_uring_sqe*>(entries_) + index;
  std::memset(made, 0, sizeof(io_uring_sqe));
  made->opcode = operation;
  made->fd = descriptor;
  made->user_data = tag;
  sq_array_[index] = index;
  return made;
}

/// What entry() gave is filled in: the kernel may see it.
void Ring::push() {
  store(sq_tail_, *sq_tail_ + 1);
  ++queued_;
}

void Ring::read(int descriptor, void* address, uint32_t length, uint64_t offset, bool on_worker,
                uint64_t tag) {
  auto* const made = static_cast<io_uring_sqe*>(entry(IORING_OP_READ, descriptor, tag));
  made->addr = reinterpret_cast<uintptr_t>(address);
  made->len = length;
  made->off = offset;
  if (on_worker) made->flags = IOSQE_ASYNC;
  push();
}

void Ring::poll(int descriptor, uint64_t tag) {
  auto* const made = static_cast<io_uring_sqe*>(entry(IORING_OP_POLL_ADD, descriptor, tag));
  uint32_t events = POLLIN;
  if constexpr (std::endian::native == std::endian::big) events = (events << 16) | (events >> 16);
  made->poll32_events = events;
  push();
}

void Ring::cancel(uint64_t target, uint64_t tag) {
  auto* const made = static_cast<io_uring_sqe*>(entry(IORING_OP_ASYNC_CANCEL, -1, tag));
  made->addr = target;
  push();
}

void Ring::nop(uint64_t tag) {
  entry(IORING_OP_NOP, -1, tag);
  push();
}

int Ring::enter(bool wait) {
  const bool ready = load(cq_tail_) != *cq_head_;
  const unsigned least = wait && !ready ? 1 : 0;
  if (least == 0 && queued_ == 0) return 0;
  const long taken = ::syscall(SYS_io_uring_enter, descriptor_, queued_, least,
                               least != 0 ? IORING_ENTER_GETEVENTS : 0, nullptr, std::size_t{0});
  if (taken >= 0) {
    queued_ -= static_cast<uint32_t>(taken);
    return 0;
  }
  if (errno == EINTR) return 0;
  if (errno == EAGAIN || errno == EBUSY ||
      errno == ENOMEM) {  // the kernel is short of something: a moment later
    std::this_thread::sleep_for(std::chrono::microseconds(100));
    return 0;
  }
  return -errno;
}

bool Ring::next(uint64_t& tag, int32_t& result) {
  const uint32_t head = *cq_head_;  // only this thread writes the head
  if (load(cq_tail_) == head) return false;
  const io_uring_cqe& completion = static_cast<const io_uring_cqe*>(completions_)[head & cq_mask_];
  tag = completion.user_data;
  result = completion.res;
  store(cq_head_, head + 1);
  return true;
}

}  // namespace specgate

#else

namespace specgate {

std::unique_ptr<Ring> Ring::make(unsigned, std::string& why) {
  why = "built without io_uring: its header was missing or older than Linux 5.6";
  return nullptr;
}
Ring::~Ring() = default;
void Ring::read(int, void*, uint32_t, uint64_t, bool, uint64_t) {}
void Ring::poll(int, uint64_t) {}
void Ring::cancel(uint64_t, uint64_t) {}
void Ring::nop(uint64_t) {}
int Ring::enter(bool) { return -ENOSYS; }
bool Ring::next(uint64_t&, int32_t&) { return false; }

}  // namespace specgate

#endif
