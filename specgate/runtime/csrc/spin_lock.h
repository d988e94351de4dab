// A mutex taken by who must not sleep: a thread that sleeps is woken some 50 microseconds late on a virtual machine.
#pragma once

#include <atomic>
#include <mutex>
#include <thread>

namespace specgate {

inline void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

/// Tries for a while before it sleeps. `waiting` counts who is here, so that long work under the lock can give way.
inline std::unique_lock<std::mutex> spin_lock(std::mutex& mutex, std::atomic<int>& waiting) {
  constexpr int kTries = 2000;  // some tens of microseconds
  std::unique_lock lock(mutex, std::try_to_lock);
  if (lock.owns_lock()) return lock;
  waiting.fetch_add(1, std::memory_order_relaxed);
  for (int i = 0; i < kTries && !lock.owns_lock(); ++i) {
    pause_briefly();
    lock.try_lock();
  }
  if (!lock.owns_lock()) lock.lock();
  waiting.fetch_sub(1, std::memory_order_relaxed);
  return lock;
}

/// Lets go of the lock until those who wait for it had it.
inline void give_way(std::unique_lock<std::mutex>& lock, const std::atomic<int>& waiting) {
  constexpr int kTries = 2000;
  lock.unlock();
  for (int i = 0; i < kTries && waiting.load(std::memory_order_relaxed) > 0; ++i) pause_briefly();
  lock.lock();
}

}  // namespace specgate
