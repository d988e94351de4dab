// What a prefetch is worth now: the formula of specgate/policy/pricing.py, with times that are measured as one goes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace specgate {

/// Running means of what the link and the events take; older ones count half after kEvents events.
class Pricer {
 public:
  static constexpr double kEvents = 64;

  /// A transfer of `bytes` kept the link for `ns`.
  void moved(double bytes, double ns, bool demand) {
    bytes_ += bytes;
    ns_ += ns;
    if (demand) demand_ns_ += ns;
  }
  /// An event begins at `now_ns`; since the last one began, `stall_ns` were waited.
  void event(int64_t now_ns, int64_t stall_ns) {
    const double fade = std::exp2(-1.0 / kEvents);
    if (last_ns_ > 0) {
      const auto all = static_cast<double>(now_ns - last_ns_);
      all_ns_ = all_ns_ * fade + all;
      work_ns_ = work_ns_ * fade + std::max(0.0, all - static_cast<double>(stall_ns));
      busy_ns_ = busy_ns_ * fade + demand_ns_;
      events_ = events_ * fade + 1.0;
    }
    if (ns_ > 1e9) bytes_ *= 0.5, ns_ *= 0.5;  // the link's speed: of about the last second of its work
    demand_ns_ = 0;
    last_ns_ = now_ns;
  }

  bool knows() const { return ns_ > 0 && events_ >= 1.0; }
  double ns_per_byte() const { return ns_ / bytes_; }
  double mean_event_ns() const { return work_ns_ / events_; }
  /// Share of the time in which demands keep the link.
  double utilisation() const { return all_ns_ > 0 ? std::min(1.0, busy_ns_ / all_ns_) : 0.0; }

  /// Whether p times the saved time exceeds the cost of the bytes now.
  ///   load_ns: what a demand of the expert would take; copy_ns: on the link; backlog_ns: what is before it there.
  bool worth(double p, int64_t events_ahead, double load_ns, double copy_ns, double backlog_ns, double value_of_victim,
             double price_scale, double price_floor = 0) const {
    const double late = std::max(0.0, backlog_ns + copy_ns - static_cast<double>(events_ahead) * mean_event_ns());
    const double saved = std::clamp(load_ns - late, 0.0, load_ns);
    return p * saved > value_of_victim * load_ns + std::max(price_floor, utilisation() * price_scale) * copy_ns;
  }

 private:
  double bytes_ = 0, ns_ = 0, demand_ns_ = 0, all_ns_ = 0, work_ns_ = 0, busy_ns_ = 0, events_ = 0;
  int64_t last_ns_ = 0;
};

}  // namespace specgate
