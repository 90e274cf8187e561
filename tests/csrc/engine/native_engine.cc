// The serving core under threads: a loop thread with connections that come and go, local callers, a loader
// that sometimes fails, versions that are swapped, statistics read throughout. Every reply is checked against
// the sum of its row; requests are conserved in every snapshot; each request is answered exactly once. Then
// the same with tiny pools, output that overflows, a model that hangs and versions that are stopped in
// traffic; and a lane that two slow runs had closed opens again. A model that hangs, and one that fails,
// opens its circuit breaker, is probed and comes back; one that never returns is not waited for.
#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "../check.h"
#include "engine/serving_core.h"
#include "sum_service.h"

using namespace penstock;
using namespace penstock::sum_service;

namespace {

std::string predict_params(int64_t user, bool list) {
  wire::Writer out(1 << 16);
  out.array(2);
  out.str("m");
  out.map(1);
  out.str("user");
  if (list) out.array(2);
  out.integer(user);
  if (list) out.integer(user + 1);
  return {reinterpret_cast<const char*>(out.data()), out.size()};
}

std::string vector_params(float a, uint32_t rows, bool low = false) {
  std::vector<float> data;
  for (uint32_t r = 0; r < rows; ++r) data.insert(data.end(), {a, static_cast<float>(r), 0.5f});
  wire::Writer out(1 << 20);
  out.array(low ? 4 : 3);
  out.str("m");
  out.bin(data.data(), data.size() * sizeof(float));
  out.uint(rows);
  if (low) {
    out.map(1);
    out.str("priority");
    out.str("low");
  }
  return {reinterpret_cast<const char*>(out.data()), out.size()};
}

struct Shape {
  uint32_t max_requests, max_queued_rows;
  int64_t max_latency_ns;
  size_t max_output_bytes;
  uint32_t most_rows;  // of a request
  bool trouble;        // hangs, stops, dropped and refused requests
};
constexpr Shape kRoomy{64, 512, 400'000'000, size_t{1} << 20, 70, false};
constexpr Shape kTiny{2, 64, 20'000'000, 900, 300, true};

struct World {
  const Shape shape;
  ServingCore core;
  std::shared_ptr<FeatureCache> cache;
  std::atomic<bool> stop{false};
  std::vector<std::shared_ptr<ServedModel>> versions;

  explicit World(const Shape& of) : shape(of) {
    RowSchema schema;
    CHECK(RowSchema::create(fields(), &schema).is_ok());
    std::unique_ptr<FeatureCache> made;
    CHECK(FeatureCache::create({60, schema.row_words(), 0}, &made).is_ok());
    cache = std::move(made);
    for (int v = 0; v < 2; ++v) {
      ServedModelConfig config;
      config.name = "m";
      config.version = std::to_string(v);
      config.lane.max_requests = shape.max_requests;
      config.lane.max_queued_rows = shape.max_queued_rows;
      config.max_resident_rows = 2 * shape.max_queued_rows;
      config.max_latency_ns = shape.max_latency_ns;
      config.inline_limit_ns = v == 0 ? 0 : 200'000;
      config.served_capacity = 512;
      if (shape.trouble) config.breaker = {10'000'000, 5'000'000, 3};
      versions.push_back(
          std::make_shared<ServedModel>(config, std::make_unique<SumModel>(), make_plan(cache), &core));
      CHECK(versions.back()->warm_up().is_ok());
      versions.back()->start();
    }
    core.publish(versions[0]);
  }
};

void local_caller(World& world, uint64_t seed) {
  std::mt19937_64 rng(seed);
  ServedModel::Scratch scratch;
  Result result;
  for (int i = 0; i < (world.shape.trouble ? 600 : 2000); ++i) {
    const auto rows = static_cast<uint32_t>(rng() % (world.shape.most_rows + 30) + 1);
    const auto a = static_cast<float>(rng() % 1000);
    const std::string params = vector_params(a, rows);
    ServingCore::LocalCall call;
    if (!world.core.begin_local(true, params, scratch, &call).is_ok()) continue;
    if (!call.model->take(call.tag, &result)) {
      call.model->wait(call.tag, call.waiter);
      CHECK(call.model->take(call.tag, &result));
    }
    if (!result.status.is_ok()) continue;
    CHECK(result.rows == rows);
    for (uint32_t r = 0; r < rows; ++r) CHECK(result.scores[r] == a + static_cast<float>(r) + 0.5f);
  }
}

void loader(World& world) {
  RowSchema schema;
  CHECK(RowSchema::create(fields(), &schema).is_ok());
  ServedModel::Scratch scratch;
  uint64_t turn = 0;
  while (!world.stop) {
    MissBatch batch;
    if (!world.core.wait_misses(1'000'000, &batch)) continue;
    if (++turn % 16 == 0) {
      world.core.fail_misses(batch, {Code::kUnavailable, "a bad day"});
      continue;
    }
    std::vector<std::vector<uint64_t>> words;
    std::vector<std::vector<RowMeta>> metas;
    std::vector<const uint64_t*> rows;
    std::vector<const RowMeta*> meta;
    for (const MissBatch::View& view : batch.views) {
      words.emplace_back(view.keys.size() * view.row_words);
      metas.emplace_back(view.keys.size(), RowMeta{INT64_MIN, INT64_MAX, 0, 0});
      for (size_t i = 0; i < view.keys.size(); ++i) {
        uint64_t* row = words.back().data() + i * view.row_words;
        const uint8_t present = 0;
        schema.init(row, view.row_words, 1, &present);
        const auto user = static_cast<double>(view.keys[i].lo);
        const double values[] = {user, 2 * user, 1.0};
        for (size_t f = 0; f < 3; ++f) {
          Block block{};
          block.f64[0] = values[f];
          block.valid = 1;
          schema.store(f, block, 1, row, view.row_words);
        }
      }
      rows.push_back(words.back().data());
      meta.push_back(metas.back().data());
    }
    world.core.finish_misses(batch, rows, meta, turn, scratch);
  }
}

void watcher(World& world) {
  const auto check = [](const EndCounters& c) {
    CHECK(c.submitted == c.in_flight + c.ok + c.rejected + c.expired + c.cancelled + c.failed);
  };
  auto stats = std::make_unique<ServedModelStats>();
  std::vector<uint64_t> ids(64);
  std::vector<int64_t> now(64), events(64);
  std::vector<uint8_t> status(64);
  std::vector<double> scores(64);
  std::vector<float> rows(64 * kFeatures);
  for (uint64_t turn = 0; !world.stop; ++turn) {
    for (const auto& version : world.versions) {
      version->stats(stats.get());
      check(stats->requests);
      check(stats->rows);
      for (const ClassStats* of : {&stats->high, &stats->low}) {
        check(of->requests);
        check(of->rows);
      }
      const size_t n = version->served().drain(
          64, {ids.data(), now.data(), status.data(), scores.data(), rows.data(), events.data()});
      for (size_t i = 0; i < n; ++i) {
        const float* row = &rows[i * kFeatures];
        CHECK(scores[i] == static_cast<double>(row[0]) + row[1] + row[2]);
      }
    }
    if (turn % 8 == 0) world.core.publish(world.versions[turn / 8 % 2]);
    if (world.shape.trouble && turn % 32 == 8) {
      world.versions[1]->hold_for_test(true);  // longer than the latency limit
      usleep(25'000);
      world.versions[1]->hold_for_test(false);
    }
    usleep(200);
  }
}

struct Peer {
  std::unique_ptr<Connection> connection;
  std::map<uint32_t, float> expected;  // unanswered msgid: its first score
  uint32_t next = 0;
};

// What was dropped for want of room for an error is not answered: the connection is closed.
void read_replies(Peer& peer, uint64_t* ok) {
  const wire::Writer* out = peer.connection->session().take_output();
  if (out == nullptr) return;
  wire::Cursor cursor(out->data(), out->data() + out->size());
  while (!cursor.at_end()) {
    uint32_t count;
    uint64_t kind, msgid;
    CHECK(cursor.read_array(&count) && count == 4 && cursor.read_uint(&kind) && kind == 1);
    CHECK(cursor.read_uint(&msgid));
    const auto at = peer.expected.find(static_cast<uint32_t>(msgid));
    CHECK(at != peer.expected.end());  // each request is answered once
    if (!cursor.read_nil()) {
      CHECK(cursor.skip() && cursor.read_nil());
    } else {
      ++*ok;
      uint32_t pairs;
      std::string_view key;
      CHECK(cursor.read_map(&pairs) && cursor.read_str(&key) && key == "scores");
      uint32_t scores;
      const uint8_t* data;
      size_t size;
      double score;
      if (cursor.read_bin(&data, &size)) {
        float first;
        std::memcpy(&first, data, sizeof first);
        score = first;
      } else {
        CHECK(cursor.read_array(&scores) && cursor.read_number(&score));
        for (uint32_t i = 1; i < scores; ++i) CHECK(cursor.skip());
      }
      CHECK(score == at->second);
      for (uint32_t i = 1; i < pairs; ++i) CHECK(cursor.skip() && cursor.skip());
    }
    peer.expected.erase(at);
  }
  peer.connection->session().output_sent();
  if (peer.connection->closed()) peer = Peer{};
}

void send(Peer& peer, std::string_view bytes) {
  std::vector<Connection::Call> others;
  while (!bytes.empty() && !peer.connection->closed()) {
    const std::span<uint8_t> room = peer.connection->session().get_buffer(bytes.size());
    const size_t n = std::min(room.size(), bytes.size());
    std::memcpy(room.data(), bytes.data(), n);
    bytes.remove_prefix(n);
    peer.connection->received(n, &others);
  }
  CHECK(others.empty());
}

void loop(World& world, uint64_t* ok) {
  std::mt19937_64 rng(11);
  std::vector<Peer> peers(4);
  const auto wait_some = [&] {
    pollfd fd{world.core.event_fd(), POLLIN, 0};
    (void)poll(&fd, 1, 1);
    (void)(fd.revents != 0 ? world.core.wake() : world.core.expire());
    for (Peer& peer : peers) {
      if (peer.connection) read_replies(peer, ok);
    }
  };
  for (int turn = 0; turn < (world.shape.trouble ? 1500 : 4000); ++turn) {
    Peer& peer = peers[rng() % peers.size()];
    if (!peer.connection || rng() % 40 == 0) {
      peer = Peer{};
      peer.connection = world.core.connect({{size_t{1} << 20, 16}, 64, world.shape.max_output_bytes});
    }
    wire::Writer out(1 << 20);
    for (uint64_t burst = rng() % 6 + 1; burst-- > 0;) {
      const uint32_t msgid = peer.next++;
      out.array(4);
      out.uint(0);
      out.uint(msgid);
      const bool low = rng() % 4 == 0;
      if (rng() % 2 == 0) {
        const auto user = static_cast<int64_t>(rng() % 200);
        out.str("predict");
        const std::string params = predict_params(user, rng() % 2 == 0);
        out.raw(params.data(), params.size());
        peer.expected[msgid] = score_of_user(user);
      } else {
        const auto a = static_cast<float>(rng() % 1000);
        out.str("predict_vectors");
        const std::string params =
            vector_params(a, static_cast<uint32_t>(rng() % world.shape.most_rows + 1), low);
        out.raw(params.data(), params.size());
        peer.expected[msgid] = a + 0.5f;
      }
      if (rng() % 10 == 0) {
        out.array(3);
        out.uint(2);
        out.str("cancel");
        out.array(1);
        out.uint(msgid);
      }
    }
    send(peer, {reinterpret_cast<const char*>(out.data()), out.size()});
    if (!world.shape.trouble || rng() % 2 == 0) read_replies(peer, ok);
    if (world.shape.trouble && turn == 1200) world.versions[1]->stop();
    if (rng() % 3 == 0) wait_some();
  }
  const auto waiting = [&] {
    for (const Peer& peer : peers) {
      if (!peer.expected.empty()) return true;
    }
    return false;
  };
  while (waiting()) wait_some();
}

uint64_t run(const Shape& shape) {
  World world(shape);
  uint64_t ok = 0;
  std::thread load([&] { loader(world); });
  std::thread watch([&] { watcher(world); });
  std::vector<std::thread> callers;
  for (uint64_t seed = 1; seed <= 2; ++seed) callers.emplace_back([&, seed] { local_caller(world, seed); });
  std::thread looper([&] { loop(world, &ok); });
  for (std::thread& caller : callers) caller.join();
  looper.join();
  world.stop = true;
  load.join();
  watch.join();
  auto stats = std::make_unique<ServedModelStats>();
  for (const auto& version : world.versions) {
    version->stop();
    version->stats(stats.get());
    CHECK(stats->requests.in_flight == 0);
  }
  world.core.close();
  return ok;
}

// Fast but for its runs `from` to `to`, which take longer than any deadline.
class StallingModel final : public Model {
 public:
  StallingModel(int from, int to) : from_(from), to_(to) {}
  size_t n_features() const override { return kFeatures; }
  size_t n_outputs() const override { return 1; }
  Status run(const float*, size_t n, double* scores) override {
    if (runs_ >= from_ && runs_ < to_) usleep(30'000);
    ++runs_;
    std::fill_n(scores, n, 0.0);
    return {};
  }

 private:
  const int from_, to_;
  int runs_ = 0;
};

void recovers_from_slow_runs() {
  ServingCore core;
  ServedModelConfig config;
  config.name = "m";
  config.max_latency_ns = 20'000'000;
  config.inline_limit_ns = 1'000'000;
  constexpr int kWarmUpRuns = 3 * 7;
  const auto model = std::make_shared<ServedModel>(
      config, std::make_unique<StallingModel>(kWarmUpRuns, kWarmUpRuns + 3), nullptr, &core);
  CHECK(model->warm_up().is_ok());
  model->start();
  core.publish(model);
  ServedModel::Scratch scratch;
  Result result;
  int refused = 0;
  int ok = 0;
  for (int i = 0; i < 200 && ok == 0; ++i) {
    ServingCore::LocalCall call;
    if (!core.begin_local(true, vector_params(1, 1), scratch, &call).is_ok()) {
      ++refused;
      continue;
    }
    if (!call.model->take(call.tag, &result)) {
      call.model->wait(call.tag, call.waiter);
      CHECK(call.model->take(call.tag, &result));
    }
    if (result.status.is_ok()) ++ok;
    // The run that was late goes on; only an idle lane is of interest.
    while (!model->idle()) usleep(500);
  }
  CHECK(refused > 0);
  CHECK(ok == 1);
}

// Does as it is told: returns, fails, or does not return until it is released.
class MoodyModel final : public Model {
 public:
  enum Mood { kWell, kFailing, kHanging };
  struct Control {
    std::atomic<int> mood{kWell};        // read by run(), written by the test
    std::atomic<int> runs{0};            // written by run(), read by the test
    std::atomic<bool> destroyed{false};  // written by the destructor, read by the test
  };
  explicit MoodyModel(std::shared_ptr<Control> control) : control_(std::move(control)) {}
  ~MoodyModel() override { control_->destroyed = true; }
  size_t n_features() const override { return kFeatures; }
  size_t n_outputs() const override { return 1; }
  Status run(const float*, size_t n, double* scores) override {
    ++control_->runs;
    while (control_->mood == kHanging) usleep(200);
    if (control_->mood == kFailing) return {Code::kInternal, "a bad day"};
    std::fill_n(scores, n, 7.0);
    return {};
  }

 private:
  const std::shared_ptr<Control> control_;
};

struct Moody {
  ServingCore core;
  std::shared_ptr<MoodyModel::Control> control = std::make_shared<MoodyModel::Control>();
  std::shared_ptr<ServedModel> model;
  ServedModel::Scratch scratch;

  Moody() {
    ServedModelConfig config;
    config.name = "m";
    config.max_latency_ns = 60'000'000'000;  // no deadline comes: only the breaker can answer for a hung run
    config.inline_limit_ns = 0;
    config.breaker = {20'000'000, 10'000'000, 3};
    model = std::make_shared<ServedModel>(config, std::make_unique<MoodyModel>(control), nullptr, &core);
    CHECK(model->warm_up().is_ok());
    model->start();
    core.publish(model);
  }
  Status call() {
    ServingCore::LocalCall call;
    if (Status status = core.begin_local(true, vector_params(1, 1), scratch, &call); !status.is_ok()) {
      CHECK(status.code != Code::kUnavailable || call.retry_after_ms >= 1);
      return status;
    }
    Result result;
    call.model->wait(call.tag, call.waiter);
    CHECK(call.model->take(call.tag, &result));
    CHECK(!result.status.is_ok() || result.scores[0] == 7.0);
    return result.status;
  }
  BreakerStats breaker() {
    auto stats = std::make_unique<ServedModelStats>();
    model->stats(stats.get());
    return stats->breaker;
  }
  void until_closed() {
    while (breaker().state != Breaker::State::kClosed) usleep(500);
  }
};

void a_hung_model_comes_back() {
  Moody world;
  for (int round = 1; round <= 3; ++round) {
    CHECK(world.call().is_ok());
    world.control->mood = MoodyModel::kHanging;
    CHECK(world.call().code == Code::kUnavailable);  // the request whose run hangs
    CHECK(world.call().code == Code::kUnavailable);  // and the next, at once
    CHECK(world.breaker().state == Breaker::State::kOpen);
    world.control->mood = MoodyModel::kWell;
    world.until_closed();
    CHECK(world.breaker().opens == static_cast<uint64_t>(round));
  }
  CHECK(world.call().is_ok());
  CHECK(world.breaker().probes >= 3);
}

void a_failing_model_comes_back() {
  Moody world;
  world.control->mood = MoodyModel::kFailing;
  for (int i = 0; i < 3; ++i) CHECK(world.call().code == Code::kInternal);
  const int runs = world.control->runs;
  CHECK(world.call().code == Code::kUnavailable);
  while (world.breaker().probes < 2) usleep(500);  // without a request
  CHECK(world.control->runs > runs);
  CHECK(world.breaker().opens == 1);
  world.control->mood = MoodyModel::kWell;
  world.until_closed();
  CHECK(world.call().is_ok());
}

void a_run_that_never_returns_is_not_waited_for() {
  auto control = std::make_shared<MoodyModel::Control>();
  {
    Moody world;
    control = world.control;
    world.control->mood = MoodyModel::kHanging;
    CHECK(world.call().code == Code::kUnavailable);
    world.model->stop();
    CHECK(world.model->idle() == false);
    world.core.close();
  }
  CHECK(!control->destroyed);  // it may still be written to
  control->mood = MoodyModel::kWell;
  while (!control->destroyed) usleep(500);
}

// Ten connections that flood and one with a request in flight at a time, on a model that takes its time.
void one_beside_floods() {
  ServingCore core;
  ServedModelConfig config;
  config.name = "m";
  config.max_latency_ns = 60'000'000'000;
  config.lane.max_requests = 512;
  config.inline_limit_ns = 1'000'000'000;
  config.lane.policy.max_batch_rows = 8;
  config.breaker.timeout_ns = config.max_latency_ns;
  const auto model = std::make_shared<ServedModel>(config, std::make_unique<SumModel>(), nullptr, &core);
  CHECK(model->warm_up().is_ok());
  model->start();
  core.publish(model);
  std::vector<Peer> floods(10);
  for (Peer& flood : floods)
    flood.connection = core.connect({{size_t{1} << 20, 16}, 100'000, size_t{1} << 22});
  Peer modest;
  modest.connection = core.connect({{size_t{1} << 20, 16}, 8, size_t{1} << 20});
  const auto ask = [](Peer& peer, int n) {
    wire::Writer out(1 << 20);
    for (; n > 0; --n) {
      out.array(4);
      out.uint(0);
      out.uint(peer.next);
      out.str("predict_vectors");
      const std::string params = vector_params(2, 1);
      out.raw(params.data(), params.size());
      peer.expected[peer.next++] = 2.5f;
    }
    send(peer, {reinterpret_cast<const char*>(out.data()), out.size()});
  };
  uint64_t flooded = 0;
  uint64_t served = 0;
  for (int turn = 0; turn < 30; ++turn) {
    model->hold_for_test(true);
    for (Peer& flood : floods) ask(flood, 200);
    ask(modest, 1);
    read_replies(modest, &served);
    CHECK(!modest.expected.empty());  // not refused: it waits
    model->hold_for_test(false);
    while (!modest.expected.empty()) {
      (void)core.wake();
      read_replies(modest, &served);
    }
    for (Peer& flood : floods) read_replies(flood, &flooded);
  }
  CHECK(served == 30);
  CHECK(flooded > 0);
  core.close();
}

}  // namespace

int main() {
  const uint64_t roomy = run(kRoomy);
  CHECK(roomy > 100);
  const uint64_t tiny = run(kTiny);
  recovers_from_slow_runs();
  a_hung_model_comes_back();
  a_failing_model_comes_back();
  a_run_that_never_returns_is_not_waited_for();
  one_beside_floods();
  std::printf("%llu and %llu replies ok\n", static_cast<unsigned long long>(roomy),
              static_cast<unsigned long long>(tiny));
  return 0;
}
