// What happened when: a ring of the newest events, for Chrome's and Perfetto's trace viewers.
#pragma once

#include <chrono>
#include <cstdint>
#include <vector>

namespace specgate {

inline int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

/// One span of time. kind: 0 READ, 1 COPY, 2 DIRECT (as JobKind), 3 STALL (a caller waited).
struct Span {
  int64_t begin_ns, end_ns;
  uint32_t block;
  uint8_t kind, level, status;
  int64_t bytes;
};

/// The newest `capacity` spans; the caller locks.
class Timeline {
 public:
  explicit Timeline(size_t capacity) : capacity_(capacity) {}

  void add(const Span& span) {
    if (capacity_ == 0) return;
    if (spans_.size() < capacity_) {
      spans_.push_back(span);
    } else {
      spans_[total_ % capacity_] = span;
    }
    ++total_;
  }

  /// Oldest first.
  std::vector<Span> spans() const {
    std::vector<Span> out;
    out.reserve(spans_.size());
    const size_t first = spans_.size() < capacity_ || capacity_ == 0 ? 0 : total_ % capacity_;
    for (size_t i = 0; i < spans_.size(); ++i) out.push_back(spans_[(first + i) % spans_.size()]);
    return out;
  }

  size_t total() const { return total_; }
  bool on() const { return capacity_ > 0; }

 private:
  size_t capacity_, total_ = 0;
  std::vector<Span> spans_;
};

}  // namespace specgate
