// The price of a prefetch, by hand.
#include "check.h"
#include "price.h"

using namespace specgate;

namespace {

/// 64 events of 1 ms, in each of which demands keep the link for `busy_ns`.
Pricer after(int64_t busy_ns) {
  Pricer pricer;
  int64_t now = 1;
  for (int i = 0; i < 2000; ++i) {
    pricer.event(now, busy_ns);
    pricer.moved(1000, static_cast<double>(busy_ns), true);
    now += 1'000'000 + busy_ns;
  }
  return pricer;
}

void means() {
  CHECK(!Pricer().knows());
  const Pricer pricer = after(500'000);
  CHECK(pricer.knows());
  CHECK(std::abs(pricer.ns_per_byte() - 500.0) < 1e-9);
  CHECK(std::abs(pricer.mean_event_ns() / 1e6 - 1.0) < 1e-9);  // without what was waited
  CHECK(std::abs(pricer.utilisation() - 1.0 / 3.0) < 1e-6);
}

void decisions() {
  const Pricer idle = after(1), busy = after(1'000'000);
  const double ms = 1e6;
  // an idle link and a free slot: whatever p
  CHECK(idle.worth(0.01, 3, ms, ms, 0, 0.0, 1.0));
  CHECK(!idle.worth(0.0, 3, ms, ms, 0, 0.0, 1.0));
  // the slot's present expert is worth 0.3: p has to be more
  CHECK(!idle.worth(0.29, 3, ms, ms, 0, 0.3, 1.0));
  CHECK(idle.worth(0.31, 3, ms, ms, 0, 0.3, 1.0));
  // demands keep the link half of the time: 0.5 of the copy's time is the price
  CHECK(std::abs(busy.utilisation() - 0.5) < 1e-6);
  CHECK(!busy.worth(0.49, 3, ms, ms, 0, 0.0, 1.0));
  CHECK(busy.worth(0.51, 3, ms, ms, 0, 0.0, 1.0));
  CHECK(busy.worth(0.26, 3, ms, ms, 0, 0.0, 0.5));
  // half of the copy comes too late: half of the time is saved
  // a link that is free has a price all the same
  CHECK(!idle.worth(0.14, 3, ms, ms, 0, 0.0, 1.0, 0.15));
  CHECK(idle.worth(0.16, 3, ms, ms, 0, 0.0, 1.0, 0.15));
  CHECK(busy.worth(0.51, 3, ms, ms, 0, 0.0, 1.0, 0.15));
  CHECK(!busy.worth(0.49, 3, ms, ms, 0, 0.0, 1.0, 0.15));
  CHECK(!idle.worth(0.59, 2, ms, ms, 1.5 * ms, 0.3, 1.0));
  CHECK(idle.worth(0.61, 2, ms, ms, 1.5 * ms, 0.3, 1.0));
  // all of it: nothing is
  CHECK(!idle.worth(1.0, 1, ms, ms, 5 * ms, 0.0, 1.0));
}

}  // namespace

int main() {
  means();
  decisions();
  return test::report("test_price");
}
