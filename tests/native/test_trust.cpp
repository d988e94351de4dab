// Trust in forecasts, by hand.
#include "check.h"
#include "trust.h"

using namespace specgate;

namespace {

bool near(double a, double b) { return std::abs(a - b) < 1e-12; }

/// `count` forecasts of p for the next event, every `used_every`-th of which comes true.
int64_t run(Trust& trust, int64_t now, double p, int count, int used_every) {
  for (int i = 0; i < count; ++i, ++now) {
    trust.settle(now);
    trust.said(0, p, now + 1, now);
    if (i % used_every == 0) trust.used({0}, now + 1);
  }
  trust.settle(now + 1);
  return now + 2;
}

void odds() {
  Trust trust(4);
  CHECK(trust.of(0.3, 1) == 0.3);  // nothing is known
  run(trust, 0, 0.5, 100, 4);      // said 50 of 100, used 25
  CHECK(near(trust.total().said, 100) && near(trust.total().stated, 50) && near(trust.total().used, 25));
  const double odds = (25.0 + 16) / (50 + 16) * (100 - 50 + 16) / (100 - 25 + 16);
  CHECK(near(trust.of(0.5, 1), odds / (1 + odds)));
  CHECK(trust.of(0.5, 2) == 0.5);  // another horizon
  CHECK(trust.of(0.3, 1) == 0.3);  // another band
  CHECK(trust.of(0.0, 1) == 0.0);
  CHECK(trust.of(0.6, 1) > trust.of(0.55, 1));  // the order within a band stays
}

void what_is_right_stays() {
  Trust trust(4);
  run(trust, 0, 0.25, 4000, 4);
  CHECK(near(trust.of(0.25, 1), 0.25));
}

void certainty_can_be_wrong() {
  Trust trust(4);
  run(trust, 0, 1.0, 1000, 10);
  CHECK(trust.of(1.0, 1) < 0.9);
  Trust right(4);
  run(right, 0, 1.0, 1000, 1);
  CHECK(right.of(1.0, 1) > 0.999);
}

void it_forgets() {
  Trust trust(4);
  const int64_t now = run(trust, 0, 0.5, 40'000, 10);
  const double before = trust.of(0.5, 1);
  run(trust, now, 0.5, 40'000, 1);
  CHECK(before < 0.15);
  CHECK(trust.of(0.5, 1) > 0.7);
}

void deadlines() {
  Trust exact(4), loose(4, 1);  // a use may come one event early
  for (Trust* trust : {&exact, &loose}) {
    trust->said(1, 0.5, 5, 0);
    trust->said(2, 0.5, 5, 0);
    trust->said(3, 0.5, 0, 0);      // over
    trust->said(3, 0.5, 5000, 0);   // too far
    trust->said(3, 0.0, 5, 0);      // says nothing
    trust->used({1}, 4);
    trust->settle(3);
    CHECK(trust->total().said == 0);
    trust->settle(9);
    CHECK(trust->total().said == 2);
    trust->said(1, 0.5, 9, 9);
    trust->settle(20);
    CHECK(trust->total().said == 2);
  }
  CHECK(exact.total().used == 0);
  CHECK(loose.total().used == 1);
}

}  // namespace

int main() {
  odds();
  what_is_right_stays();
  certainty_can_be_wrong();
  it_forgets();
  deadlines();
  return test::report("test_trust");
}
