// A peer of a real serving core for the fuzzers: bytes go in as a socket would bring them, and whatever comes
// out must be whole MessagePack, answer each request at most once, and leave nothing in flight.
#pragma once

#include <poll.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <span>
#include <vector>

#include "../engine/sum_service.h"
#include "check.h"
#include "engine/serving_core.h"

namespace penstock {

class FuzzPeer {
 public:
  static constexpr size_t kMaxMessage = 4096;
  static constexpr uint32_t kMaxInFlight = 8;

  FuzzPeer() {
    CHECK(RowSchema::create(sum_service::fields(), &schema_).is_ok());
    std::unique_ptr<FeatureCache> cache;
    CHECK(FeatureCache::create({64, schema_.row_words(), 0}, &cache).is_ok());
    ServedModelConfig config;
    config.name = "m";
    config.version = "1";
    config.lane.max_requests = 64;
    config.lane.max_queued_rows = 4096;
    config.allow_replay = true;
    config.served_capacity = 64;
    model_ = std::make_shared<ServedModel>(config, std::make_unique<sum_service::SumModel>(),
                                           sum_service::make_plan(std::move(cache)), &core_);
    CHECK(model_->warm_up().is_ok());
    model_->start();
    core_.publish(model_);
    connect();
  }

  ~FuzzPeer() {
    connection_.reset();
    core_.close();
  }

  // A new connection; `authorized`: without it, an `auth` must come before anything is predicted.
  void connect(bool authorized = true) {
    connection_ = core_.connect({{kMaxMessage, 16}, kMaxInFlight, size_t{1} << 16});
    if (!authorized) connection_->authorize(0);
  }

  // The bytes arrive, at most `most` at a time.
  void feed(const uint8_t* data, size_t size, size_t most) {
    while (size > 0 && !connection_->closed()) {
      const std::span<uint8_t> room = connection_->session().get_buffer(most);
      CHECK(!room.empty());
      const size_t n = std::min({room.size(), size, most});
      std::memcpy(room.data(), data, n);
      data += n;
      size -= n;
      std::vector<Connection::Call> others;
      for (size_t arrived = n;; arrived = 0) {
        others.clear();
        connection_->received(arrived, &others);
        bool again = false;
        for (const Connection::Call& call : others) {
          ++calls;
          if (call.method == "auth") {
            connection_->authorize(Connection::kForever);
            again = true;
          }
          (void)(call.msgid % 2 ? connection_->reply(call.msgid, "\xc3")
                                : connection_->reply_error(call.msgid, Status::invalid("no"), false, -1));
        }
        if (!again) break;
      }
      CHECK(connection_->session().input_capacity() <= kMaxMessage + wire::Session::kChunk);
      CHECK(connection_->session().in_flight() <= kMaxInFlight);
      load();
      read();
    }
  }

  // Waits until everything is answered; a closed connection is dropped and made anew.
  void settle() {
    for (int turn = 0; !connection_->closed() && connection_->session().in_flight() > 0; ++turn) {
      CHECK(turn < 20'000);
      pollfd fd{core_.event_fd(), POLLIN, 0};
      (void)poll(&fd, 1, 1);
      (void)core_.wake();
      (void)core_.expire();
      load();
      read();
    }
    read();
    if (connection_->closed()) connect();
    auto stats = std::make_unique<ServedModelStats>();
    model_->stats(stats.get());
    for (const EndCounters& c : {stats->requests, stats->rows}) {
      CHECK(c.submitted == c.in_flight + c.ok + c.rejected + c.expired + c.cancelled + c.failed);
    }
    scored = stats->requests.ok;
  }

  bool closed() const { return connection_->closed(); }
  uint64_t calls = 0, ok = 0, errors = 0, scored = 0;

 private:
  void load() {
    MissBatch batch;
    if (!core_.wait_misses(0, &batch)) return;
    if (++loads_ % 8 == 0) {
      core_.fail_misses(batch, {Code::kUnavailable, "a bad day"});
      return;
    }
    std::vector<std::vector<uint64_t>> words;
    std::vector<std::vector<RowMeta>> metas;
    std::vector<const uint64_t*> rows;
    std::vector<const RowMeta*> meta;
    for (const MissBatch::View& view : batch.views) {
      words.emplace_back(view.keys.size() * view.row_words);
      metas.emplace_back(view.keys.size(), RowMeta{INT64_MIN, INT64_MAX, 0, 0});
      const uint8_t present = 0;
      for (size_t i = 0; i < view.keys.size(); ++i)
        schema_.init(words.back().data() + i * view.row_words, view.row_words, 1, &present);
      rows.push_back(words.back().data());
      meta.push_back(metas.back().data());
    }
    core_.finish_misses(batch, rows, meta, loads_, scratch_);
  }

  void read() {
    const wire::Writer* out = connection_->session().take_output();
    if (out == nullptr) return;
    wire::Cursor cursor(out->data(), out->data() + out->size());
    while (!cursor.at_end()) {
      uint32_t count;
      uint64_t kind, msgid;
      CHECK(cursor.read_array(&count) && count == 4 && cursor.read_uint(&kind) && kind == 1);
      if (!cursor.read_nil()) CHECK(cursor.read_uint(&msgid) && msgid <= UINT32_MAX);
      if (cursor.read_nil()) {
        ++ok;
        CHECK(cursor.skip());
      } else {
        ++errors;
        CHECK(cursor.skip() && cursor.read_nil());
      }
    }
    connection_->session().output_sent();
  }

  ServingCore core_;
  RowSchema schema_;
  std::shared_ptr<ServedModel> model_;
  std::unique_ptr<Connection> connection_;
  ServedModel::Scratch scratch_;
  uint64_t loads_ = 0;
};

}  // namespace penstock
