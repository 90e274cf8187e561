// The policy's pure functions: learned run times, batch forming, admission.

#include <cstdint>
#include <vector>

#include "batch/policy.h"
#include "check.h"

using penstock::Admission;
using penstock::admit;
using penstock::BatchDecision;
using penstock::form_batch;
using penstock::PolicyConfig;
using penstock::QueuedWork;
using penstock::RunTimeModel;

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
  model.record(64, 900'000'000);  // two are no longer an accident
  CHECK(model.predict(64) == 900'000'000);
  for (size_t i = 0; i < RunTimeModel::kWindow; ++i) model.record(64, 1'000);
  CHECK(model.predict(64) == 1'000);  // and are forgotten
}

void an_idle_lane_starts_at_once() {
  const RunTimeModel model(1'000);
  const QueuedWork queue[] = {{50'000'000, 1}};
  const BatchDecision decision = form_batch(queue, 1, 0, model, PolicyConfig{});
  CHECK(decision.expired == 0 && decision.take == 1 && decision.rows == 1);
}

void a_batch_is_full_at_its_limit() {
  const RunTimeModel model(1'000);
  std::vector<QueuedWork> queue(100, QueuedWork{50'000'000, 3});
  const BatchDecision decision = form_batch(queue.data(), queue.size(), 0, model, PolicyConfig{});
  CHECK(decision.take == 21 && decision.rows == 63);  // a 22nd piece would make 66
}

void a_batch_grows_only_while_its_earliest_member_is_in_time() {
  RunTimeModel model;
  for (size_t rows = 1; rows <= 64; rows *= 2) {
    for (int i = 0; i < 3; ++i) model.record(rows, static_cast<int64_t>(rows) * 1'000'000);
  }
  std::vector<QueuedWork> queue(64, QueuedWork{10'000'000, 1});
  PolicyConfig config;
  config.guard_ns = 0;
  const BatchDecision decision = form_batch(queue.data(), queue.size(), 0, model, config);
  CHECK(decision.take == 8);  // 8 rows take 8 ms of the 10; 9 rows would take 16
}

void a_piece_that_cannot_make_it_is_dropped() {
  const RunTimeModel model(5'000'000);
  const QueuedWork queue[] = {{4'000'000, 1}, {5'000'000, 1}, {5'000'001, 1}};
  const BatchDecision decision = form_batch(queue, 3, 0, model, PolicyConfig{});
  CHECK(decision.expired == 2 && decision.take == 1);
}

void admission_counts_the_work_before() {
  const RunTimeModel model(10'000'000);
  PolicyConfig config;
  config.guard_ns = 0;
  CHECK(admit(0, 1, 10'000'001, 0, 0, model, config).admitted);
  CHECK(!admit(0, 1, 10'000'000, 0, 0, model, config).admitted);
  const Admission refused = admit(64 * 5, 64, 50'000'000, 0, 0, model, config);
  CHECK(!refused.admitted && refused.retry_after_ns == 50'000'000);
  CHECK(admit(64 * 3, 64, 50'000'000, 0, 5'000'000, model, config).admitted);
  CHECK(!admit(64 * 3, 64, 50'000'000, 0, 15'000'000, model, config).admitted);  // a run in progress counts
  config.guard_ns = 20'000'000;
  CHECK(admit(0, 1, 15'000'000, 0, 0, model, config).admitted);   // waived on an idle lane
  CHECK(!admit(1, 1, 25'000'000, 0, 0, model, config).admitted);  // kept behind others
}

}  // namespace

int main() {
  run_time_is_learned_per_size();
  one_outlier_does_not_poison();
  an_idle_lane_starts_at_once();
  a_batch_is_full_at_its_limit();
  a_batch_grows_only_while_its_earliest_member_is_in_time();
  a_piece_that_cannot_make_it_is_dropped();
  admission_counts_the_work_before();
  return 0;
}
