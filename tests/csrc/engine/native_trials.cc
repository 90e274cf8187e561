// Trials under threads: local callers and a connection ask while versions are put on trial as a shadow, as a
// canary or not at all, and statistics and served rows are read. Every answer is the sum of its row; requests
// are conserved in the shadow too; every row that it scored is served once, marked, with the id of its
// request. A shadow that hangs or fails changes no answer, and what it has no room for is refused and
// counted.
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../check.h"
#include "engine/serving_core.h"
#include "sum_service.h"

using namespace penstock;
using namespace penstock::sum_service;

namespace {

enum Mood { kWell, kFailing, kHanging };

// The score is the sum of the row, when it is well.
class MoodySum final : public Model {
 public:
  explicit MoodySum(std::shared_ptr<std::atomic<int>> mood) : mood_(std::move(mood)) {}
  size_t n_features() const override { return kFeatures; }
  size_t n_outputs() const override { return 1; }
  Status run(const float* rows, size_t n, double* scores) override {
    while (*mood_ == kHanging) usleep(200);
    if (*mood_ == kFailing) return {Code::kInternal, "a bad day"};
    for (size_t i = 0; i < n; ++i) scores[i] = double{rows[3 * i]} + rows[3 * i + 1] + rows[3 * i + 2];
    return {};
  }

 private:
  const std::shared_ptr<std::atomic<int>> mood_;  // written by the test, read by run()
};

class Narrow final : public Model {
 public:
  size_t n_features() const override { return 2; }
  size_t n_outputs() const override { return 1; }
  Status run(const float*, size_t n, double* scores) override {
    std::fill_n(scores, n, 0.0);
    return {};
  }
};

std::string vector_params(float a, uint32_t rows) {
  std::vector<float> data;
  for (uint32_t r = 0; r < rows; ++r) data.insert(data.end(), {a, static_cast<float>(r), 0.5f});
  wire::Writer out(1 << 20);
  out.array(3);
  out.str("m");
  out.bin(data.data(), data.size() * sizeof(float));
  out.uint(rows);
  return {reinterpret_cast<const char*>(out.data()), out.size()};
}

struct Trials {
  ServingCore core;
  std::shared_ptr<std::atomic<int>> mood = std::make_shared<std::atomic<int>>(kWell);
  std::shared_ptr<ServedModel> champion, tried;

  explicit Trials(uint32_t room = 4096, int64_t breaker_ns = 60'000'000'000) {
    champion = make("1", std::make_unique<SumModel>(), 4096, 60'000'000'000);
    tried = make("2", std::make_unique<MoodySum>(mood), room, breaker_ns);
    core.publish(champion);
  }
  ~Trials() {
    *mood = kWell;
    core.close();
  }
  std::shared_ptr<ServedModel> make(const std::string& version, std::unique_ptr<Model> model, uint32_t room,
                                    int64_t breaker_ns) {
    ServedModelConfig config;
    config.name = "m";
    config.version = version;
    config.lane.max_requests = room;
    config.max_latency_ns = 60'000'000'000;  // no deadline comes
    config.breaker = {breaker_ns, 5'000'000, 3};
    auto made = std::make_shared<ServedModel>(config, std::move(model), nullptr, &core);
    CHECK(made->warm_up().is_ok());
    made->start();
    return made;
  }
  // Rows answered, each checked.
  uint32_t ask(float a, uint32_t rows, ServedModel::Scratch& scratch, Result& result) {
    ServingCore::LocalCall call;
    if (!core.begin_local(true, vector_params(a, rows), scratch, &call).is_ok()) {
      CHECK(call.model == tried);
      return 0;
    }
    if (!call.model->take(call.tag, &result)) {
      call.model->wait(call.tag, call.waiter);
      CHECK(call.model->take(call.tag, &result));
    }
    if (!result.status.is_ok()) {
      CHECK(call.model == tried);  // a canary that fails or hangs
      return 0;
    }
    CHECK(result.rows == rows);
    for (uint32_t r = 0; r < rows; ++r) CHECK(result.scores[r] == a + static_cast<float>(r) + 0.5f);
    core.shadow(*call.model, result);
    return rows;
  }
  std::unique_ptr<ServedModelStats> stats() {
    auto read = std::make_unique<ServedModelStats>();
    tried->stats(read.get());
    for (const EndCounters& c : {read->requests, read->rows})
      CHECK(c.submitted == c.in_flight + c.ok + c.rejected + c.expired + c.cancelled + c.failed);
    return read;
  }
  void until_idle() {
    while (stats()->requests.in_flight > 0) usleep(500);
  }
  Status shadow(double share) {
    return core.put_on_trial(
        "m", {tried, TrialMode::kShadow, static_cast<uint32_t>(share * static_cast<double>(Trial::kWhole))});
  }
};

struct Drained {
  std::vector<uint64_t> ids;
  uint64_t seen = 0, unseen = 0;

  void take(ServedRing& ring) {
    constexpr size_t kMost = 256;
    uint64_t id[kMost];
    int64_t now[kMost];
    uint8_t status[kMost];
    double scores[kMost];
    float rows[kMost * kFeatures];
    int64_t none[1];
    for (size_t n; (n = ring.drain(kMost, {id, now, status, scores, rows, none})) > 0;) {
      for (size_t i = 0; i < n; ++i) {
        CHECK(scores[i] == double{rows[3 * i]} + rows[3 * i + 1] + rows[3 * i + 2]);
        CHECK(now[i] > 0);
        ++((status[i] & kShadowRow) != 0 ? unseen : seen);
        ids.push_back(id[i]);
      }
    }
  }
};

// A shadow of all keys scores each answered row once.
void a_shadow_scores_what_is_answered() {
  Trials world;
  CHECK(world.shadow(1).is_ok());
  ServedModel::Scratch scratch;
  Result result;
  std::vector<uint64_t> answered;
  for (int i = 0; i < 200; ++i) {
    (void)world.ask(static_cast<float>(i), static_cast<uint32_t>(i % 9 + 1), scratch, result);
    answered.insert(answered.end(), result.request_ids.begin(), result.request_ids.begin() + result.rows);
  }
  world.until_idle();
  Drained drained;
  drained.take(world.tried->served());
  CHECK(drained.seen == 0);
  CHECK(drained.ids == answered);
  CHECK(world.stats()->rows.ok == answered.size());
  CHECK(world.stats()->requests.ok == 200 && world.stats()->low.requests.ok == 200);
  CHECK(world.stats()->inline_runs == 0);  // the callers' threads never run it
}

void of_other_inputs_it_is_refused() {
  Trials world;
  const auto narrow = world.make("3", std::make_unique<Narrow>(), 16, 1'000'000'000);
  CHECK(world.core.put_on_trial("m", {narrow, TrialMode::kShadow, 1}).code == Code::kFailedPrecondition);
  CHECK(world.core.put_on_trial("m", {world.champion, TrialMode::kCanary, 1}).code ==
        Code::kFailedPrecondition);
  CHECK(world.core.put_on_trial("m", {narrow, TrialMode::kCanary, 0}).is_ok());
  narrow->stop();
}

// Neither a run that never ends nor one that fails changes an answer.
void a_hung_or_failing_shadow_is_not_felt() {
  Trials world(8, 20'000'000);
  CHECK(world.shadow(1).is_ok());
  ServedModel::Scratch scratch;
  Result result;
  uint32_t asked = 0;
  for (const Mood mood : {kHanging, kFailing}) {
    *world.mood = mood;
    for (int i = 0; i < 300; ++i, ++asked) CHECK(world.ask(3, 2, scratch, result) == 2);
  }
  *world.mood = kWell;
  world.until_idle();
  auto stats = world.stats();
  CHECK(stats->requests.submitted == asked);
  CHECK(stats->requests.rejected > 0);  // there was no room, or the breaker was open
  // It comes back.
  for (uint64_t before = stats->requests.ok; stats->requests.ok == before; stats = world.stats()) {
    CHECK(world.ask(3, 2, scratch, result) == 2);
    usleep(500);
  }
  ServedModelStats champion;
  world.champion->stats(&champion);
  CHECK(champion.requests.ok == champion.requests.submitted);
}

// Another live version ends the trial.
void publishing_ends_it() {
  Trials world;
  CHECK(world.shadow(1).is_ok());
  world.core.publish(world.tried);
  ServingCore::Route route;
  CHECK(world.core.find("m", &route) && route.champion == world.tried && route.trial.model == nullptr);
  world.core.publish(world.champion);
}

void in_traffic() {
  Trials world(64, 20'000'000);
  std::atomic<bool> stop{false};
  std::atomic<uint64_t> answered{0};
  std::vector<std::thread> threads;
  for (uint64_t seed = 0; seed < 2; ++seed) {
    threads.emplace_back([&, seed] {
      std::mt19937_64 rng(seed);
      ServedModel::Scratch scratch;
      Result result;
      for (int i = 0; i < 3000; ++i) {
        answered += world.ask(static_cast<float>(rng() % 500), static_cast<uint32_t>(rng() % 20 + 1), scratch,
                              result);
      }
    });
  }
  threads.emplace_back([&] {  // the loop
    const auto connection = world.core.connect({{size_t{1} << 20, 16}, 64, size_t{1} << 22});
    std::vector<Connection::Call> others;
    for (uint32_t i = 0; i < 2000; ++i) {
      wire::Writer out(1 << 16);
      out.array(4);
      out.uint(0);
      out.uint(i);
      out.str("predict_vectors");
      const std::string params = vector_params(static_cast<float>(i), 3);
      out.raw(params.data(), params.size());
      const auto room = connection->session().get_buffer(out.size());
      CHECK(room.size() >= out.size());
      std::memcpy(room.data(), out.data(), out.size());
      connection->received(out.size(), &others);
      (void)(i % 4 == 0 ? world.core.expire() : world.core.wake());
      if (!connection->take_output().empty()) connection->output_sent();
    }
    while (connection->session().in_flight() > 0) {
      usleep(200);
      (void)world.core.expire();
      if (!connection->take_output().empty()) connection->output_sent();
    }
  });
  Drained drained;
  std::thread reader([&] {
    while (!stop) {
      drained.take(world.tried->served());
      (void)world.stats();
      usleep(300);
    }
  });
  std::thread changer([&] {
    std::mt19937_64 rng(5);
    while (!stop) {
      const auto share = static_cast<uint32_t>(rng() % (Trial::kWhole + 1));
      const TrialMode mode = rng() % 3 == 0 ? TrialMode::kCanary : TrialMode::kShadow;
      CHECK(world.core.put_on_trial("m", rng() % 5 == 0 ? Trial{} : Trial{world.tried, mode, share}).is_ok());
      *world.mood = rng() % 8 == 0 ? kFailing : rng() % 8 == 0 ? kHanging : kWell;
      usleep(1000);
      *world.mood = kWell;
    }
  });
  for (std::thread& thread : threads) thread.join();
  stop = true;
  changer.join();
  reader.join();
  world.until_idle();
  drained.take(world.tried->served());
  const auto stats = world.stats();
  CHECK(answered > 0 && drained.unseen > 0 && drained.seen > 0);
  CHECK(drained.seen + drained.unseen + stats->served_dropped == stats->rows.ok);
}

}  // namespace

int main() {
  a_shadow_scores_what_is_answered();
  of_other_inputs_it_is_refused();
  a_hung_or_failing_shadow_is_not_felt();
  publishing_ends_it();
  in_traffic();
  return 0;
}
