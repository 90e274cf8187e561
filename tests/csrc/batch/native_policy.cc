// The policy: learned run times, batch forming, admission, shares.

#include <algorithm>
#include <cstdint>
#include <random>
#include <vector>

#include "batch/lane.h"
#include "check.h"

using namespace penstock;

namespace {

void run_time_is_learned_per_size() {
  RunTimeModel model(500);
  CHECK(model.predict(1) == 500 && model.predict(64) == 500);
  model.record(8, 1'000);
  CHECK(model.predict(8) == 1'000 && model.predict(5) == 1'000);  // 5..8 share a bucket
  CHECK(model.predict(4) == 1'000);                               // a larger run bounds a smaller one
  CHECK(model.predict(64) == 8'000);                              // a smaller one is scaled by rows
}

void one_outlier_does_not_poison() {
  RunTimeModel model;
  for (int i = 0; i < 10; ++i) model.record(64, 1'000);
  model.record(64, 1'000'000'000);
  CHECK(model.predict(64) == 1'000);
  model.record(64, 900'000'000);  // two of so few runs are no longer an accident
  CHECK(model.predict(64) == 900'000'000);
  for (size_t i = 0; i < RunTimeModel::kWindow; ++i) model.record(64, 1'000);
  CHECK(model.predict(64) == 1'000);  // and are forgotten
}

void three_of_many_do_not_poison() {
  RunTimeModel model;
  for (size_t i = 0; i < RunTimeModel::kWindow; ++i) model.record(64, 1'000);
  for (int i = 0; i < 3; ++i) model.record(64, 1'000'000'000);
  CHECK(model.predict(64) == 1'000);
  model.record(64, 900'000'000);  // four are no longer an accident
  CHECK(model.predict(64) == 900'000'000);
  for (size_t i = 0; i < RunTimeModel::kWindow; ++i) model.record(64, 1'000);
  CHECK(model.predict(64) == 1'000);  // and are forgotten
}

// Against the definition, sorted anew each time.
void run_time_is_a_high_quantile() {
  std::mt19937_64 rng(3);
  RunTimeModel model;
  std::vector<int64_t> runs;
  for (int i = 0; i < 20'000; ++i) {
    runs.push_back(static_cast<int64_t>(rng() % (i % 1000 < 500 ? 5 : 1'000'000)));
    model.record(64, runs.back());
    std::vector<int64_t> window(runs.end() - std::min<int64_t>(i + 1, RunTimeModel::kWindow), runs.end());
    std::sort(window.begin(), window.end());
    const size_t n = window.size();
    CHECK(model.predict(64) == window[n - (n < 2 ? 1 : n < 16 ? 2 : n < 32 ? 3 : 4)]);
  }
}

constexpr int64_t kMs = 1'000'000;

LaneConfig lane_config(int64_t initial_run_ns = 1'000) {
  return {.policy = {.guard_ns = 0}, .max_flows = 4, .initial_run_ns = initial_run_ns};
}

size_t rows_of(std::span<const Piece> batch) {
  size_t rows = 0;
  for (const Piece& piece : batch) rows += piece.rows;
  return rows;
}

void an_idle_lane_starts_at_once() {
  Lane lane(lane_config());
  CHECK(lane.submit(1, {1, 50 * kMs}, 0).slot != Lane::kNoSlot);
  CHECK(rows_of(lane.next_batch(0)) == 1 && lane.ended().empty());
}

void a_batch_is_full_at_its_limit() {
  Lane lane(lane_config());
  for (uint64_t tag = 0; tag < 100; ++tag) (void)lane.submit(tag, {3, 50 * kMs}, 0);
  CHECK(rows_of(lane.next_batch(0)) == 64);  // the last request is cut
  CHECK(rows_of(lane.next_batch(0)) == 64);
  CHECK(lane.queued_rows() == 300 - 128);
}

void a_batch_grows_only_while_its_earliest_member_is_in_time() {
  Lane lane(lane_config());
  for (size_t rows = 1; rows <= 64; rows *= 2) {
    for (int i = 0; i < 3; ++i) lane.record_run(rows, static_cast<int64_t>(rows) * kMs);
  }
  CHECK(lane.submit(0, {1, 10 * kMs}, 0).slot != Lane::kNoSlot);
  for (uint64_t tag = 1; tag < 20; ++tag) CHECK(lane.submit(tag, {1, 90 * kMs}, 0).slot != Lane::kNoSlot);
  CHECK(rows_of(lane.next_batch(0)) == 8);  // 8 rows take 8 ms of the 10; 9 rows would take 16
  CHECK(lane.ended().empty());
}

void a_piece_that_cannot_make_it_is_dropped() {
  Lane lane(lane_config(kMs));
  CHECK(lane.submit(1, {1, 40 * kMs}, 0).slot != Lane::kNoSlot);
  CHECK(lane.submit(2, {100, 41 * kMs}, 0).slot != Lane::kNoSlot);
  CHECK(lane.submit(3, {1, 42 * kMs}, 0).slot != Lane::kNoSlot);
  const auto batch = lane.next_batch(39 * kMs);  // 100 rows are two runs
  CHECK(batch.size() == 1 && rows_of(batch) == 1);
  CHECK(lane.ended().size() == 2 && lane.ended()[0].tag == 1 && lane.ended()[1].tag == 2);
  CHECK(lane.ended()[0].end == End::kExpired && lane.ended()[1].end == End::kExpired);
}

// A head whose deadline makes a poor batch is served on a lane that keeps up, and dropped on one that cannot
// serve all: there every poor batch costs another request its deadline.
void a_saturated_lane_drops_what_makes_poor_batches() {
  for (const bool saturated : {false, true}) {
    Lane lane(lane_config());
    for (const size_t rows : {1, 2, 4, 8, 16, 32, 64}) {
      for (int i = 0; i < 3; ++i) lane.record_run(rows, (rows <= 2 ? 5 : 10) * kMs);
    }
    CHECK(lane.submit(1, {1, 7 * kMs}, 0).slot != Lane::kNoSlot);
    uint64_t tag = 2;
    while (tag < (saturated ? 4096 : 100) && lane.submit(tag, {1, 50 * kMs, 1}, 0).slot != Lane::kNoSlot)
      ++tag;
    const size_t rows = rows_of(lane.next_batch(0));
    CHECK(rows == (saturated ? 64 : 2));
    CHECK(lane.ended().size() == (saturated ? 1 : 0));
  }
}

void low_rows_ride_where_they_cost_nothing() {
  Lane lane(lane_config());
  for (uint64_t tag = 0; tag < 5; ++tag) (void)lane.submit(tag, {1, 50 * kMs}, 0);
  for (uint64_t tag = 5; tag < 90; ++tag) (void)lane.submit(tag, {1, 50 * kMs, 0, true}, 0);
  CHECK(rows_of(lane.next_batch(0)) == 8);  // 5 high ones, and as many as run in the same predicted time
  CHECK(lane.queue(false).empty() && lane.queue(true).rows() == 82);
  CHECK(rows_of(lane.next_batch(0)) == 64);
}

void every_kth_batch_is_low() {
  LaneConfig config = lane_config();
  config.policy.low_every = 3;
  config.policy.max_batch_rows = 2;
  Lane lane(config);
  std::vector<bool> low(200);
  for (uint64_t tag = 0; tag < 60; ++tag) {
    low[tag] = tag % 2 == 1;
    CHECK(lane.submit(tag, {1, 50 * kMs, 0, low[tag]}, 0).slot != Lane::kNoSlot);
  }
  for (int turn = 0; turn < 12; ++turn) {
    const auto span = lane.next_batch(0);
    const std::vector<Piece> batch(span.begin(), span.end());
    lane.clear_ended();
    lane.finish(batch, 0, 1'000, true);
    for (const Ended& ended : lane.ended()) CHECK(low[ended.tag] == (turn % 3 == 2));
    lane.clear_ended();
  }
}

// Deadlines decide among connections, and more so within one, while nobody has more than a round waiting.
void an_urgent_request_goes_first() {
  Lane lane(lane_config(kMs));
  for (uint64_t tag = 0; tag < 63; ++tag)
    (void)lane.submit(tag, {1, 90 * kMs, static_cast<uint32_t>(tag % 2)}, 0);
  CHECK(lane.submit(100, {64, 10 * kMs, 2}, 0).slot != Lane::kNoSlot);
  const auto batch = lane.next_batch(0);
  CHECK(batch.size() == 1 && batch[0].rows == 64);
}

void admission_counts_the_work_before() {
  const RunTimeModel model(10'000'000);
  PolicyConfig config;
  config.guard_ns = 0;
  const auto ask = [&](uint64_t ahead, uint64_t rows, int64_t deadline_ns, int64_t busy_until_ns) {
    return admit({.rows = ahead, .busy_until_ns = busy_until_ns}, rows, deadline_ns, 0, model, config);
  };
  CHECK(ask(0, 1, 10'000'001, 0).admitted);
  CHECK(!ask(0, 1, 10'000'000, 0).admitted);
  const Admission refused = ask(64 * 5, 64, 50'000'000, 0);
  CHECK(!refused.admitted && refused.retry_after_ns == 50'000'000);
  CHECK(ask(64 * 3, 64, 50'000'000, 5'000'000).admitted);
  CHECK(!ask(64 * 3, 64, 50'000'000, 15'000'000).admitted);  // a run in progress counts
  config.guard_ns = 20'000'000;
  CHECK(ask(0, 1, 15'000'000, 0).admitted);   // waived on an idle lane
  CHECK(!ask(1, 1, 25'000'000, 0).admitted);  // kept behind others
}

// Of the other class only the batches that come first under the policy.
void admission_counts_the_other_class_as_it_is_served() {
  const RunTimeModel model(10'000'000);
  PolicyConfig config;
  config.guard_ns = 0;
  config.low_every = 4;
  const auto ask = [&](Ahead ahead, int64_t deadline_ns) {
    return admit(ahead, 1, deadline_ns, 0, model, config).admitted;
  };
  const Ahead high{.other_rows = 10'000};
  CHECK(ask(high, 10'000'001) && !ask(high, 10'000'000));  // no low batch is due before it
  const Ahead due{.other_rows = 10'000, .high_batches = 3};
  CHECK(ask(due, 20'000'001) && !ask(due, 20'000'000));  // one is
  const Ahead fourth{.rows = 3 * 64, .other_rows = 10'000};
  CHECK(ask(fourth, 50'000'001) && !ask(fourth, 50'000'000));  // one comes after the third high batch
  const Ahead low{.other_rows = 10'000, .low = true};
  CHECK(ask(low, 40'000'001) && !ask(low, 40'000'000));  // at most three high batches before its turn
  const Ahead quiet{.other_rows = 64, .low = true};
  CHECK(ask(quiet, 20'000'001) && !ask(quiet, 20'000'000));  // no more of them than wait
}

void the_bounds_are_what_they_say() {
  PolicyConfig config;
  config.low_every = 8;
  CHECK(low_batches_before(1, 0, config) == 0 && low_batches_before(1, 7, config) == 1);
  CHECK(low_batches_before(7, 0, config) == 0 && low_batches_before(8, 0, config) == 1);
  CHECK(low_wait_bound(1, 100, config) == 800 && low_wait_bound(2, 100, config) == 1600);
  CHECK(!low_is_due(6, config) && low_is_due(7, config));
}

// However the greedy take, each of a quarter as many newcomers finds room; one alone may take most of the
// rest.
void newcomers_find_room() {
  for (const uint64_t total : {4U, 100U, 4096U}) {
    std::mt19937_64 rng(total);
    std::vector<uint64_t> held(total / 8 + 1);
    uint64_t free = total;
    for (uint64_t turn = 0; turn < 20 * total; ++turn) {
      uint64_t& mine = held[turn < 10 * total ? rng() % held.size() : 0];
      if (rng() % 4 == 0 && mine > 0) {
        --mine, ++free;
      } else if (within_share(mine, 1, free, total)) {
        ++mine, --free;
      }
    }
    for (uint64_t newcomer = 0; newcomer + held.size() < total / 4; ++newcomer, --free)
      CHECK(within_share(0, 1, free, total));
  }
  uint64_t alone = 0;
  while (within_share(alone, 1, 4096 - alone, 4096)) ++alone;
  CHECK(alone > 4096 / 2);
}

void cheap_batches_run_on_the_reading_thread() {
  InlineBudget dear(200'000);
  CHECK(dear.take(100'001) && !dear.take(100'001));
  CHECK(!InlineBudget(200'000).take(200'001));
  InlineBudget cheap(200'000);
  int batches = 0;
  while (cheap.take(25'000)) ++batches;
  CHECK(batches == 64);  // eight limits' worth
  InlineBudget mixed(200'000);
  CHECK(mixed.take(190'000) && mixed.take(100'000) && !mixed.take(100'001));
  CHECK(!InlineBudget(0).take(1));
}

}  // namespace

int main() {
  run_time_is_learned_per_size();
  one_outlier_does_not_poison();
  three_of_many_do_not_poison();
  run_time_is_a_high_quantile();
  an_idle_lane_starts_at_once();
  a_batch_is_full_at_its_limit();
  a_batch_grows_only_while_its_earliest_member_is_in_time();
  a_piece_that_cannot_make_it_is_dropped();
  a_saturated_lane_drops_what_makes_poor_batches();
  low_rows_ride_where_they_cost_nothing();
  every_kth_batch_is_low();
  an_urgent_request_goes_first();
  admission_counts_the_work_before();
  admission_counts_the_other_class_as_it_is_served();
  the_bounds_are_what_they_say();
  newcomers_find_room();
  cheap_batches_run_on_the_reading_thread();
  return 0;
}
