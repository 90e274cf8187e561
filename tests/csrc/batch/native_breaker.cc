// The circuit breaker, event by event, and on random schedules of runs that are fast, slow, hung or failed.

#include <cstdint>
#include <random>

#include "batch/breaker.h"
#include "check.h"

using namespace penstock;

namespace {

constexpr int64_t kMs = 1'000'000;
constexpr BreakerConfig kConfig{.timeout_ns = 100 * kMs, .probe_ns = 1'000 * kMs, .failures = 3};
using State = Breaker::State;

void a_hung_run_opens_it_and_a_probe_closes_it() {
  Breaker breaker(kConfig);
  CHECK(breaker.closed() && breaker.due_ns() == Breaker::kNever && breaker.probe_at_ns() == Breaker::kNever);
  breaker.started(0, 1 * kMs);
  CHECK(breaker.due_ns() == 100 * kMs);
  CHECK(!breaker.check(100 * kMs - 1) && breaker.closed());
  CHECK(breaker.check(100 * kMs) && breaker.state() == State::kOpen && breaker.opens() == 1);
  CHECK(!breaker.check(200 * kMs));                 // told once
  CHECK(breaker.probe_at_ns() == Breaker::kNever);  // the model is busy with the run that hangs
  CHECK(breaker.retry_after_ns(200 * kMs) == kConfig.probe_ns);
  const Breaker::Outcome outcome = breaker.finished(5'000 * kMs, true);
  CHECK(outcome.hung && !outcome.opened && breaker.state() == State::kOpen);
  CHECK(breaker.probe_at_ns() == 5'000 * kMs);  // free to be tried at once
  breaker.probe();
  CHECK(breaker.state() == State::kHalfOpen && breaker.probes() == 1);
  breaker.started(5'000 * kMs, 1 * kMs);
  CHECK(!breaker.finished(5'001 * kMs, true).hung && breaker.closed());
}

void a_run_that_nobody_watched_hangs_too() {
  Breaker breaker(kConfig);
  breaker.started(0, 1 * kMs);
  const Breaker::Outcome outcome = breaker.finished(150 * kMs, true);
  CHECK(outcome.hung && outcome.opened && !breaker.closed() && breaker.probe_at_ns() == 150 * kMs);
}

void the_limit_follows_the_predicted_time() {
  Breaker breaker(kConfig);
  breaker.started(0, 50 * kMs);
  CHECK(breaker.due_ns() == 400 * kMs);
  CHECK(!breaker.finished(399 * kMs, true).hung && breaker.closed());
  breaker.started(0, Breaker::kNever / 2);  // saturates
  CHECK(breaker.due_ns() > kMs && !breaker.check(1'000'000 * kMs));
}

void failures_in_a_row_open_it() {
  Breaker breaker(kConfig);
  for (const bool ok : {false, false, true, false, false}) {
    breaker.started(0, kMs);
    CHECK(!breaker.finished(kMs, ok).opened && breaker.closed());
  }
  breaker.started(0, kMs);
  CHECK(breaker.finished(kMs, false).opened && breaker.state() == State::kOpen);
  CHECK(breaker.probe_at_ns() == 1'001 * kMs && breaker.retry_after_ns(kMs) == 1'000 * kMs);
  CHECK(breaker.retry_after_ns(1'001 * kMs) == kMs);  // never 0: it would come back at once
  // A probe that fails puts the next one off.
  breaker.probe();
  breaker.started(1'001 * kMs, kMs);
  CHECK(!breaker.finished(1'002 * kMs, false).opened && breaker.state() == State::kOpen);
  CHECK(breaker.probe_at_ns() == 2'002 * kMs && breaker.opens() == 1);
  // So does one that hangs.
  breaker.probe();
  breaker.started(2'002 * kMs, kMs);
  CHECK(!breaker.check(2'200 * kMs) && breaker.state() == State::kOpen);
  CHECK(breaker.finished(3'000 * kMs, true).hung && breaker.probe_at_ns() == 4'000 * kMs);
  breaker.probe();
  breaker.started(4'000 * kMs, kMs);
  (void)breaker.finished(4'001 * kMs, true);
  CHECK(breaker.closed() && breaker.probes() == 3);
  // What failed before it opened is forgotten.
  breaker.started(0, kMs);
  CHECK(!breaker.finished(kMs, false).opened && breaker.closed());
}

void random_schedules() {
  for (uint64_t seed = 0; seed < 20'000; ++seed) {
    std::mt19937_64 rng(seed);
    Breaker breaker({static_cast<int64_t>(1 + rng() % 200) * kMs, static_cast<int64_t>(1 + rng() % 200) * kMs,
                     static_cast<uint32_t>(1 + rng() % 4)});
    int64_t now = 0;
    uint64_t opens = 0;
    for (int run = 0; run < 40; ++run) {
      const bool well = run >= 20;  // trouble passes: then it must close
      if (!breaker.closed()) {
        const int64_t at = breaker.probe_at_ns();
        CHECK(at != Breaker::kNever && at - now <= 200 * kMs);  // idle: a probe is always to come
        now = std::max(now, at);
        breaker.probe();
      }
      const bool probing = !breaker.closed();
      breaker.started(now, kMs);
      const int64_t due = breaker.due_ns();
      const int64_t ends =
          now + (!well && rng() % 4 == 0 ? static_cast<int64_t>(rng() % 500) * kMs : 100'000);
      bool opened = false;
      for (int look = 0; look < 3; ++look) {
        now += (ends - now) / 2;
        const bool found = breaker.check(now);
        CHECK(!found || (now >= due && !opened && !probing));
        opened = opened || found;
        CHECK(now < due || !breaker.closed());
        CHECK(breaker.closed() || breaker.probe_at_ns() == Breaker::kNever);  // one run at a time
      }
      now = ends;
      const bool ok = well || rng() % 3 != 0;
      const Breaker::Outcome outcome = breaker.finished(now, ok);
      CHECK(outcome.hung == (ends >= due));
      CHECK(!(outcome.opened && opened));
      opened = opened || outcome.opened;
      opens += opened ? 1 : 0;
      CHECK(breaker.opens() == opens);
      if (outcome.hung || (probing && !ok)) CHECK(breaker.state() == State::kOpen);
      if (ok && !outcome.hung) CHECK(breaker.closed());
    }
    CHECK(breaker.closed());
  }
}

}  // namespace

int main() {
  a_hung_run_opens_it_and_a_probe_closes_it();
  a_run_that_nobody_watched_hangs_too();
  the_limit_follows_the_predicted_time();
  failures_in_a_row_open_it();
  random_schedules();
  return 0;
}
