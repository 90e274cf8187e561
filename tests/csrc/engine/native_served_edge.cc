// A served model with an edge cache. One thread: what hits, what runs and what enters, changes of feature
// rows, rows of several, equal requests in flight and the ends of their leader, predictions made ahead, lanes
// that are too cheap. Then threads: callers whose answers may never be older than a feature row that was put
// before they asked, with cancels, expiry, failing runs and requests conserved in every snapshot.
#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../check.h"
#include "edge_service.h"

using namespace penstock;
using namespace penstock::edge_service;

namespace {

void repeats_are_hits_and_served_as_computed() {
  World world;
  world.put_user(5, 10, 77, kForever, 3);
  CHECK(world.score({{5}, 1}) == 11);
  CHECK(world.shared->runs == 1);
  for (int i = 0; i < 3; ++i) CHECK(world.score({{5}, 1}) == 11);
  CHECK(world.result.row_status[0] == 3 && world.result.with_status);
  CHECK(world.shared->runs == 1);
  CHECK(world.score({{5}, 2}) == 12);  // another input
  CHECK(world.shared->runs == 2);
  ServedModelStats stats;
  const EdgeStats edge = world.edge(&stats);
  CHECK(edge.enabled && edge.active);
  CHECK(edge.cache.hits == 3 && edge.cache.misses == 2 && edge.cache.admitted == 2 && edge.cache.size == 2);
  CHECK(stats.requests.ok == 5 && stats.rows.ok == 5 && stats.stages.total.count() == 5);
  const Served served(*world.model);
  CHECK(served.n == 5);
  for (size_t i = 0; i < 4; ++i) {
    CHECK(served.scores[i] == 11 && served.rows[i * 2] == 10 && served.rows[i * 2 + 1] == 1);
    CHECK(served.events[i] == 77 && served.status[i] == 3);
    CHECK(i == 0 || served.ids[i] != served.ids[i - 1]);
  }
}

void no_cache_neither_reads_nor_fills() {
  World world;
  world.put_user(5, 10, 1);
  const std::string vectors = vector_params(1, 2);
  for (int i = 0; i < 2; ++i) {
    ServingCore::LocalCall call;
    // Its features are loaded for the request alone.
    CHECK(world.core.begin_local(false, params_of({{5}, 1, true}), world.scratch, &call).is_ok());
    MissBatch batch;
    CHECK(world.core.wait_misses(1'000'000'000, &batch) && batch.views[0].fill_cache[0] == 0);
    world.core.fail_misses(batch, {Code::kUnavailable, "none"});
    CHECK(call.model->take(call.tag, &world.result));
  }
  const EdgeStats edge = world.edge();
  CHECK(edge.cache.hits + edge.cache.misses == 0 && edge.cache.admitted == 0);
}

void changes_of_features_are_seen() {
  World world;
  world.put_user(5, 10, 1);
  CHECK(world.score({{5}, 1}) == 11);
  world.put_user(5, 20, 2);
  CHECK(world.score({{5}, 1}) == 21);
  CHECK(world.score({{5}, 1}) == 21);
  CHECK(world.shared->runs == 2);
  CHECK(world.edge().cache.stale == 1);
  // A row that is valid no more takes its predictions with it: it is a miss, which nobody loads here.
  world.put_user(6, 1, 1, /*valid_until=*/1);
  ServingCore::LocalCall call;
  CHECK(world.core.begin_local(false, params_of({{6}, 1, false, 20}), world.scratch, &call).is_ok());
  call.model->wait(call.tag, call.waiter);
  CHECK(call.model->take(call.tag, &world.result));
  CHECK(world.result.status.code == Code::kDeadlineExceeded);
}

void rows_of_several() {
  World world;
  for (int64_t u = 0; u < 5; ++u) world.put_user(u, static_cast<float>(10 * u), 1);
  CHECK(world.score({{0, 1, 2}, 1}) == 1);
  CHECK(world.shared->rows == 3);
  CHECK(world.score({{1}, 1}) == 11);  // filled by the rows of the request before
  CHECK(world.score({{2, 0}, 1}) == 21);
  CHECK(world.result.scores[1] == 1 && world.result.rows == 2);
  CHECK(world.shared->rows == 3);
  CHECK(world.score({{4, 1}, 1}) == 41);  // one row is new: all run
  CHECK(world.result.scores[1] == 11);
  CHECK(world.shared->rows == 5);
  const Served served(*world.model);
  CHECK(served.n == 8);
  CHECK(served.scores[4] == 21 && served.scores[5] == 1 && served.rows[4 * 2] == 20);
}

void vectors_have_keys_of_their_own() {
  World world;
  world.put_user(1, 1, 1);
  for (int i = 0; i < 2; ++i) {
    world.call(true, vector_params(1, 2));
    CHECK(world.result.status.is_ok() && world.result.scores[0] == 3);
  }
  CHECK(world.shared->runs == 1);
  CHECK(world.score({{1}, 2}) == 3);
  CHECK(world.shared->runs == 2);
  world.call(true, vector_params(2, 1));
  CHECK(world.shared->runs == 3);
}

// A connection that pipelines predict calls and reads their replies.
struct Peer {
  std::unique_ptr<Connection> connection;
  std::map<uint32_t, int> codes;  // msgid: 0 ok, 1 error
  explicit Peer(World& world)
      : connection(world.core.connect({{size_t{1} << 22, 16}, 4096, size_t{1} << 22})) {}

  void send(const wire::Writer& out) {
    std::vector<Connection::Call> others;
    std::string_view bytes(reinterpret_cast<const char*>(out.data()), out.size());
    while (!bytes.empty()) {
      const std::span<uint8_t> room = connection->session().get_buffer(bytes.size());
      const size_t n = std::min(room.size(), bytes.size());
      std::memcpy(room.data(), bytes.data(), n);
      bytes.remove_prefix(n);
      connection->received(n, &others);
    }
  }
  static void add(wire::Writer& out, uint32_t msgid, const std::string& params) {
    out.array(4);
    out.uint(0);
    out.uint(msgid);
    out.str("predict");
    out.raw(params.data(), params.size());
  }
  static void add_cancel(wire::Writer& out, uint32_t msgid) {
    out.array(3);
    out.uint(2);
    out.str("cancel");
    out.array(1);
    out.uint(msgid);
  }
  void read() {
    const std::string_view bytes = connection->take_output();
    if (bytes.empty()) return;
    wire::Cursor cursor(reinterpret_cast<const uint8_t*>(bytes.data()),
                        reinterpret_cast<const uint8_t*>(bytes.data()) + bytes.size());
    while (!cursor.at_end()) {
      uint32_t count;
      uint64_t kind, msgid;
      CHECK(cursor.read_array(&count) && count == 4 && cursor.read_uint(&kind) && cursor.read_uint(&msgid));
      const bool ok = cursor.read_nil();
      if (!ok) CHECK(cursor.skip());
      CHECK(cursor.skip());
      CHECK(codes.emplace(static_cast<uint32_t>(msgid), ok ? 0 : 1).second);  // one end each
    }
    connection->output_sent();
  }
  void read_until(World& world, size_t answers) {
    while (codes.size() < answers) {
      pollfd fds[] = {{world.core.event_fd(), POLLIN, 0}, {world.core.timer_fd(), POLLIN, 0}};
      (void)poll(fds, 2, 10);
      if (fds[0].revents != 0) world.core.wake();
      if (fds[1].revents != 0) world.core.expire();
      read();
    }
  }
  size_t ok() const {
    return static_cast<size_t>(
        std::count_if(codes.begin(), codes.end(), [](const auto& c) { return c.second == 0; }));
  }
};

void equal_misses_run_once() {
  World world;
  world.put_user(5, 10, 1);
  world.model->hold_for_test(true);
  Peer peer(world);
  wire::Writer out(1 << 20);
  for (uint32_t i = 0; i < 1000; ++i) Peer::add(out, i, params_of({{5}, 1}));
  peer.send(out);
  while (world.edge().coalesced < 999) usleep(100);
  world.model->hold_for_test(false);
  peer.read_until(world, 1000);
  CHECK(peer.ok() == 1000);
  CHECK(world.shared->runs == 1 && world.shared->rows == 1);
  CHECK(Served(*world.model).n == 1000);
  ServedModelStats stats;
  (void)world.edge(&stats);
  CHECK(stats.requests.ok == 1000 && stats.requests.in_flight == 0);
}

// Also when all of them wait for the loader first.
void equal_misses_of_the_store_run_once() {
  World world;
  Peer peer(world);
  wire::Writer out(1 << 20);
  for (uint32_t i = 0; i < 300; ++i) Peer::add(out, i, params_of({{5}, 1}));
  peer.send(out);
  MissBatch batch;
  CHECK(world.core.wait_misses(1'000'000'000, &batch));
  CHECK(batch.waiting.size() == 300);
  RowSchema schema;
  CHECK(RowSchema::create(kFields, &schema).is_ok());
  std::vector<uint64_t> row(schema.row_words() * batch.views[0].keys.size());
  std::vector<RowMeta> meta(batch.views[0].keys.size(), RowMeta{0, kForever, 0, 0});
  for (size_t i = 0; i < meta.size(); ++i) {
    const uint8_t present = 0;
    schema.init(row.data() + i * schema.row_words(), schema.row_words(), 1, &present);
    Block block{};
    block.f64[0] = 10;
    block.valid = 1;
    schema.store(0, block, 1, row.data() + i * schema.row_words(), schema.row_words());
  }
  world.core.finish_misses(batch, {row.data()}, {meta.data()}, 1, world.scratch);
  peer.read_until(world, 300);
  CHECK(peer.ok() == 300);
  CHECK(world.shared->rows == 1);
  CHECK(world.score({{5}, 1}) == 11);
  CHECK(world.shared->rows == 1);
}

// The features change while a leader is in flight: who asks afterwards gets the new ones.
void a_follower_has_the_same_features() {
  World world;
  world.put_user(5, 10, 1);
  world.model->hold_for_test(true);
  Peer peer(world);
  wire::Writer out(1 << 20);
  for (uint32_t i = 0; i < 3; ++i) Peer::add(out, i, params_of({{5}, 1}));
  peer.send(out);
  world.put_user(5, 20, 2);
  ServingCore::LocalCall call;
  CHECK(world.core.begin_local(false, params_of({{5}, 1}), world.scratch, &call).is_ok());
  CHECK(world.edge().coalesced == 2);
  world.model->hold_for_test(false);
  call.model->wait(call.tag, call.waiter);
  CHECK(call.model->take(call.tag, &world.result));
  CHECK(world.result.status.is_ok() && world.result.scores[0] == 21);
  peer.read_until(world, 3);
  CHECK(peer.ok() == 3);
  CHECK(world.score({{5}, 1}) == 21);  // and the older result has not replaced the newer one
}

void leaders_that_end_early() {
  World world;
  world.put_user(5, 10, 1);
  // Cancelled while it waits behind another run, then while its run is on; the next takes over each time.
  world.model->hold_for_test(true);
  Peer peer(world);
  wire::Writer out(1 << 20);
  for (uint32_t i = 0; i < 10; ++i) Peer::add(out, i, params_of({{5}, 1}));
  for (uint32_t i = 0; i < 4; ++i) Peer::add_cancel(out, i);
  Peer::add_cancel(out, 7);  // a follower
  peer.send(out);
  while (world.edge().coalesced < 9) usleep(100);
  world.model->hold_for_test(false);
  peer.read_until(world, 10);
  CHECK(peer.ok() == 5);
  for (const uint32_t i : {0u, 1u, 2u, 3u, 7u}) CHECK(peer.codes[i] == 1);
  // Expired: each has a deadline of its own, and an end by it.
  world.model->hold_for_test(true);
  wire::Writer more(1 << 20);
  Peer::add(more, 20, params_of({{5}, 3, false, 30}));
  Peer::add(more, 21, params_of({{5}, 3, false, 60}));
  Peer::add(more, 22, params_of({{5}, 3}));
  Peer::add(more, 23, params_of({{5}, 3}));
  peer.send(more);
  peer.read_until(world, 12);
  CHECK(peer.codes.count(20) == 1 && peer.codes[20] == 1 && peer.codes.count(21) == 1 && peer.codes[21] == 1);
  world.model->hold_for_test(false);
  peer.read_until(world, 14);
  CHECK(peer.codes[22] == 0 && peer.codes[23] == 0);
  // The peer goes away with leader and followers; another's follower lives on.
  world.model->hold_for_test(true);
  wire::Writer last(1 << 20);
  for (uint32_t i = 30; i < 33; ++i) Peer::add(last, i, params_of({{5}, 4}));
  peer.send(last);
  Peer other(world);
  wire::Writer one(1 << 20);
  Peer::add(one, 1, params_of({{5}, 4}));
  other.send(one);
  peer.connection->drop();
  world.model->hold_for_test(false);
  other.read_until(world, 1);
  CHECK(other.ok() == 1);
  while (!world.model->idle()) usleep(500);
  ServedModelStats stats;
  (void)world.edge(&stats);
  CHECK(stats.requests.in_flight == 0 && stats.requests.cancelled == 5 + 3 && stats.requests.expired == 2);
}

void a_failed_run_fails_all_and_leaves_no_entry() {
  World world;
  world.put_user(5, 10, 1);
  world.model->hold_for_test(true);
  world.shared->fail = true;
  Peer peer(world);
  wire::Writer out(1 << 20);
  for (uint32_t i = 0; i < 50; ++i) Peer::add(out, i, params_of({{5}, 1}));
  peer.send(out);
  world.model->hold_for_test(false);
  peer.read_until(world, 50);
  CHECK(peer.ok() == 0);
  CHECK(world.shared->runs == 1);
  world.shared->fail = false;
  CHECK(world.score({{5}, 1}) == 11);
  CHECK(world.shared->runs == 2);
  // Stopped with a group in flight: each is told.
  world.model->hold_for_test(true);
  wire::Writer more(1 << 20);
  for (uint32_t i = 100; i < 120; ++i) Peer::add(more, i, params_of({{5}, 2}));
  peer.send(more);
  world.model->stop();
  peer.read_until(world, 70);
  ServedModelStats stats;
  (void)world.edge(&stats);
  CHECK(stats.requests.in_flight == 0 && stats.requests.failed == 70);
}

void hot_inputs_are_computed_ahead() {
  World world;
  for (int64_t u = 0; u < 300; ++u) world.put_user(u, static_cast<float>(u), 1);
  for (int round = 0; round < 4; ++round) {
    for (int64_t u = 0; u < 20; ++u) CHECK(world.score({{u}, 1}) == static_cast<double>(u + 1));
  }
  for (int64_t u = 100; u < 300; ++u) (void)world.score({{u}, 1});  // once each
  for (int i = 0; i < 4; ++i) world.call(true, vector_params(500, 1));
  const auto hot = world.model->hot_inputs();
  CHECK(hot.size() == 21);
  const int64_t now_us = 1'700'000'000'000'000;
  const auto next = world.make_model("2", EdgeMode::kOn, 20'000'000'000, 3000);
  // A feature row that is gone is named, and its input left out until it is back.
  world.users->discard(key_of_int(3), 5, 0);
  const auto missing = next->hot_misses(hot, now_us, world.scratch);
  CHECK(missing.size() == 1 && missing[0].key == key_of_int(3));
  CHECK(next->precompute(hot, now_us, 1'000'000'000, world.scratch) == 20);
  world.put_user(3, 33, 6);
  CHECK(next->hot_misses(hot, now_us, world.scratch).empty());
  CHECK(next->precompute(hot, now_us, 1'000'000'000, world.scratch) == 1);
  CHECK(next->precompute(hot, now_us, 1'000'000'000, world.scratch) == 0);
  CHECK(Served(*next).n == 0);  // nothing of it was answered to anybody
  const int rows = world.shared->rows;
  world.core.publish(next);
  for (int64_t u = 0; u < 20; ++u) CHECK(world.score({{u}, 1}) == (u == 3 ? 34 : static_cast<double>(u + 1)));
  CHECK(world.result.status.is_ok());
  world.call(true, vector_params(500, 1));
  CHECK(world.result.scores[0] == 501);
  CHECK(world.shared->rows == rows);
  // After a put, those that it touched are computed again; the new version has taken the hot inputs over.
  world.put_user(4, 44, 7);
  CHECK(next->precompute(next->hot_inputs(), now_us, 1'000'000'000, world.scratch) == 1);
  CHECK(world.score({{4}, 1}) == 45);
  CHECK(world.shared->rows == rows + 1);
  world.model = next;
  CHECK(world.edge().precomputed == 22);
}

void cheap_lanes_pass_it_by() {
  World cheap(EdgeMode::kAuto);
  cheap.put_user(5, 10, 1);
  for (int i = 0; i < 200; ++i) (void)cheap.score({{5}, 1});
  World off(EdgeMode::kOff);
  off.put_user(5, 10, 1);
  for (int i = 0; i < 3; ++i) (void)off.score({{5}, 1});
  CHECK(off.shared->runs == 3 && !off.edge().enabled);
  // A lane that grows slow begins to use it.
  World slow(EdgeMode::kAuto);
  slow.put_user(5, 10, 1);
  slow.shared->sleep_us = 300;
  for (int i = 0; i < 150; ++i) (void)slow.score({{5}, 1});
  CHECK(slow.edge().active);
  CHECK(slow.shared->runs < 140);
}

void threads() {
  constexpr int64_t kUsers = 6;
  World world(EdgeMode::kOn, 50'000'000, 30);
  std::array<std::atomic<uint64_t>, kUsers> ended{};
  for (int64_t u = 0; u < kUsers; ++u) {
    world.put_user(u, 1, 1);
    ended[static_cast<size_t>(u)] = 1;
  }
  std::atomic<bool> stop{false};
  std::atomic<uint64_t> ok{0};
  std::thread writer([&] {
    std::mt19937_64 rng(1);
    for (uint64_t stamp = 2; !stop; ++stamp) {
      const auto u = static_cast<int64_t>(rng() % kUsers);
      world.put_user(u, static_cast<float>(stamp), stamp);
      ended[static_cast<size_t>(u)] = stamp;
      if (stamp % 4 == 0) usleep(100);
      world.shared->fail = stamp % 64 == 0;
      world.shared->sleep_us = stamp % 128 == 0 ? 2000 : 0;
    }
  });
  const auto caller = [&](uint64_t seed) {
    std::mt19937_64 rng(seed);
    ServedModel::Scratch scratch;
    Result result;
    for (int i = 0; i < 3000; ++i) {
      const auto u = static_cast<int64_t>(rng() % kUsers);
      const auto x = static_cast<float>(rng() % 3) / 4;
      std::vector<int64_t> users{u};
      if (rng() % 4 == 0) users.push_back((u + 1) % kUsers);
      const uint64_t floor = ended[static_cast<size_t>(u)];
      ServingCore::LocalCall call;
      const double limit = rng() % 8 == 0 ? 1.5 : 0;
      if (!world.core.begin_local(false, params_of({users, x, false, limit}), scratch, &call).is_ok())
        continue;
      if (!call.model->take(call.tag, &result)) {
        call.model->wait(call.tag, call.waiter);
        CHECK(call.model->take(call.tag, &result));
      }
      if (!result.status.is_ok()) continue;
      CHECK(result.scores[0] - x >= static_cast<double>(floor));
      CHECK(result.scores[0] - x == std::floor(result.scores[0] - x));
      ++ok;
    }
  };
  std::thread loop([&] {
    std::mt19937_64 rng(9);
    for (int turn = 0; turn < 60; ++turn) {
      Peer peer(world);
      wire::Writer out(1 << 20);
      for (uint32_t i = 0; i < 40; ++i) {
        Peer::add(out, i,
                  params_of({{static_cast<int64_t>(rng() % 2)}, 0.25f, false, rng() % 4 == 0 ? 2.0 : 0.0}));
        if (rng() % 5 == 0) Peer::add_cancel(out, static_cast<uint32_t>(rng() % (i + 1)));
      }
      peer.send(out);
      if (turn % 3 == 0) continue;  // it hangs up
      peer.read_until(world, 40);
    }
  });
  std::thread watch([&] {
    while (!stop) {
      (void)world.edge();
      (void)world.model->precompute(world.model->hot_inputs(), 1'700'000'000'000'000, 5'000'000,
                                    world.scratch);
      const Served served(*world.model);
      for (size_t i = 0; i < served.n; ++i)
        CHECK(served.scores[i] == static_cast<double>(served.rows[i * 2]) + served.rows[i * 2 + 1]);
      usleep(2000);
    }
  });
  std::vector<std::thread> callers;
  for (uint64_t seed = 2; seed < 4; ++seed) callers.emplace_back(caller, seed);
  for (std::thread& each : callers) each.join();
  loop.join();
  stop = true;
  writer.join();
  watch.join();
  while (!world.model->idle()) usleep(500);
  ServedModelStats stats;
  const EdgeStats edge = world.edge(&stats);
  CHECK(stats.requests.in_flight == 0);
  CHECK(ok > 100);
  std::printf("threads: %llu ok, %llu hits, %llu stale, %llu coalesced, %llu precomputed\n",
              static_cast<unsigned long long>(ok.load()), static_cast<unsigned long long>(edge.cache.hits),
              static_cast<unsigned long long>(edge.cache.stale),
              static_cast<unsigned long long>(edge.coalesced),
              static_cast<unsigned long long>(edge.precomputed));
  CHECK(edge.cache.hits > 0 && edge.cache.stale > 0);
}

}  // namespace

int main() {
  repeats_are_hits_and_served_as_computed();
  no_cache_neither_reads_nor_fills();
  changes_of_features_are_seen();
  rows_of_several();
  vectors_have_keys_of_their_own();
  equal_misses_run_once();
  equal_misses_of_the_store_run_once();
  a_follower_has_the_same_features();
  leaders_that_end_early();
  a_failed_run_fails_all_and_leaves_no_entry();
  hot_inputs_are_computed_ahead();
  cheap_lanes_pass_it_by();
  threads();
  return 0;
}
