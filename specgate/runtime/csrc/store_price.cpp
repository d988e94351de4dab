// Which forecasts are worth their bytes now.
#include "store.h"

#include <algorithm>

namespace specgate {

/// Puts the chance that was learned in the place of the p that was said.
void Store::believe(Foreknown& f) {
  const int64_t now = ledger_->now(), ahead = f.deadline - now;
  if (!trust_ || ahead < 1 || ahead > Trust::kFar || f.target != Target::Device) return;
  trust_->settle(now - 1);  // what the event under way uses may not have been told yet
  const double said = f.p;
  f.p = trust_->of(said, ahead);
  trust_->said(f.block, said, f.deadline, now);
}

Asked Store::ask(Foreknown f) {
  if (f.block < ledger_->size() && f.p >= 0 && f.p <= 1) believe(f);
  if (config_.price_scale >= 0 && f.block < ledger_->size() && f.p >= 0 && f.p <= 1 && !(near(f) && worth(f))) {
    ledger_->hint(f.block, f.p, f.deadline);
    ++counters_.unworthy;
    return Asked::Refused;
  }
  return ledger_->prefetch(f.block, f.p, f.deadline, f.target);
}

/// Looked up once for all forecasts of a call: it takes a look at every slot.
double Store::value_of_victim(uint32_t shape_class) {
  if (victims_.size() <= shape_class) victims_.resize(shape_class + 1, -1.0);
  double& value = victims_[shape_class];
  if (value >= 0) return value;
  value = 0;
  if (!ledger_->has_free_slot(shape_class)) {
    const int64_t victim = ledger_->policy().victim(shape_class);
    if (victim >= 0) value = ledger_->policy().value(static_cast<uint32_t>(victim));
  }
  return value;
}

/// Whether a new transfer may begin so early.
bool Store::near(const Foreknown& f) const {
  const Block& block = ledger_->block(f.block);
  return config_.prefetch_depth <= 0 || f.deadline >= kNoDeadline ||
         f.deadline - ledger_->now() <= config_.prefetch_depth ||
         f.target != Target::Device || block.device != Place::Absent || block.want;
}

/// What cannot be judged yet, or needs no new transfer, is.
bool Store::worth(const Foreknown& f) {
  const Block& block = ledger_->block(f.block);
  if (f.target != Target::Device || f.deadline < ledger_->now() || block.device != Place::Absent || block.want) {
    return true;
  }
  if (!pricer_.knows()) return true;
  const auto bytes = static_cast<double>(ledger_->bytes(f.block));
  const double copy_ns = bytes * pricer_.ns_per_byte();
  const bool in_host = block.host != Place::Absent || config_.ledger.resident_host;
  const double load_ns = copy_ns + (in_host || read_bytes_ <= 0 ? 0.0 : bytes * read_ns_ / read_bytes_);
  const double value = value_of_victim(block.shape_class);
  const int64_t ahead = std::max<int64_t>(f.deadline - ledger_->now(), 1);
  // behind more than this it would save nothing
  const double most = (static_cast<double>(ahead) * pricer_.mean_event_ns() + load_ns) / copy_ns + 1.0;
  const int64_t before = ledger_->backlog(f.deadline, f.p, ledger_->bytes(f.block), static_cast<int64_t>(std::min(most, 4096.0)));
  const double backlog_ns = static_cast<double>(before) * pricer_.ns_per_byte();
  return pricer_.worth(f.p, ahead, load_ns, copy_ns, backlog_ns, value, config_.price_scale, config_.price_floor);
}

}  // namespace specgate
