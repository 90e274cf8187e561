// The edge cache of a ServedModel: answers before admission, one run for equal requests, entries from
// finished runs, and predictions made ahead.
//
// A call of any number of rows is answered at once if every row is a hit; else all its rows run as if there
// were no cache, and enter it when they have scores. A call of one row that meets an equal one in flight
// (same fingerprint, same model row bit for bit, so neither a change of features nor a collision can mix two
// results) waits for that one's scores, with a deadline and an end of its own. If the leader fails, so do
// they; if it ends without a run (expired, cancelled), the first of them takes its place in the lane.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <thread>

#include "engine/served_model.h"

namespace penstock {
namespace {

constexpr double kAverageOver = 16.0;  // runs
constexpr double kMostOverAverage = 8.0;
constexpr int64_t kPrecomputeRunNs = 2'000'000;  // how long one run of precompute() may delay others
constexpr uint32_t kPrecomputeNotices = 4;       // a hot input counts as seen so often, at most

// One row of a predict call as the params of another, without options; false if it does not fit.
bool encode_row(const wire::PredictCall& call, std::vector<uint8_t>& bytes) {
  thread_local wire::Writer out(HotInputs::kMaxBytes, HotInputs::kMaxBytes);
  out.clear();
  out.array(3);
  out.str(call.model);
  for (const wire::Columns* columns : {&call.entities, &call.inputs}) {
    out.map(columns->size);
    for (uint32_t c = 0; c < columns->size; ++c) {
      const wire::Column& column = columns->column[c];
      wire::Cursor end = column.cursor();
      if (!end.skip()) return false;
      out.str(column.name);
      out.raw(column.value, static_cast<size_t>(end.position() - column.value));
    }
  }
  if (out.overflowed()) return false;
  bytes.assign(out.data(), out.data() + out.size());
  return true;
}

}  // namespace

Status ServedModel::make_edge() {
  const EdgeConfig& settings = config_.edge;
  if (settings.mode == EdgeMode::kOff) return {};
  const bool service = plan_ != nullptr && plan_->fingerprintable();
  EdgeCacheConfig shape{settings.capacity,
                        settings.ttl_ns,
                        static_cast<uint32_t>(n_outputs_),
                        static_cast<uint32_t>(n_features_),
                        {},
                        false};
  for (size_t v = 0; v < n_views_; ++v) shape.views.push_back(plan_->view(v).cache);
  std::unique_ptr<EdgeCache> cache;
  if (Status status = EdgeCache::create(shape, &cache); !status.is_ok()) return status;
  SipHash128 start(settings.seed);
  for (const std::string& part : {config_.name, config_.version}) {
    const uint64_t size = part.size();
    start.add(&size, sizeof size);
    start.add(part.data(), part.size());
  }
  edge_ = std::make_unique<ServedEdge>(settings, std::move(cache), start, service,
                                       static_cast<uint32_t>(requests_.size()), config_.max_resident_rows,
                                       n_views_);
  if (edge_->active) edge_->cache->populate();
  return {};
}

// The memory of the entries is touched here, before the version is live, if the warm-up says that the lane
// will use them.
void ServedModel::edge_warmed_up() {
  if (edge_ != nullptr && edge_->active.load(std::memory_order_relaxed)) edge_->cache->populate();
}

void ServedModel::edge_learn(int64_t elapsed_ns, size_t rows) {
  ServedEdge& edge = *edge_;
  if (edge.config.mode != EdgeMode::kAuto) return;
  const auto n = static_cast<double>(rows);
  auto elapsed = static_cast<double>(elapsed_ns);
  if (edge.run_rows == 0.0) {
    edge.run_ns = elapsed;
    edge.run_rows = n;
  }
  // A lone outlier (the thread lost its processor) moves the average little; a real change, in some runs.
  elapsed = std::min(elapsed, kMostOverAverage * std::max(edge.run_ns, edge.run_ns / edge.run_rows * n));
  edge.run_ns += (elapsed - edge.run_ns) / kAverageOver;
  edge.run_rows += (n - edge.run_rows) / kAverageOver;
  const double row_ns = edge.run_ns / edge.run_rows;
  const auto least = static_cast<double>(edge.config.least_row_ns);
  if (row_ns >= least) edge.active.store(true, std::memory_order_relaxed);
  if (row_ns < least / 2) edge.active.store(false, std::memory_order_relaxed);
}

// True when `*status` and `*tag` are the answer. Sets scratch.edge.used where the call's rows may be cached.
bool ServedModel::edge_answers(const Admission& admission, const wire::PredictCall& call, uint64_t first_id,
                               Scratch& scratch, Status* status, uint64_t* tag) {
  ServedEdge& edge = *edge_;
  if (!edge.service) return false;
  std::vector<Key128>& keys = scratch.edge.keys;
  if (keys.size() < call.rows) keys.resize(call.rows);
  // What is wrong with a call is for the gathering to say.
  if (!plan_->fingerprint(call, admission.now_us, edge.service_start, scratch.plan, keys.data()).is_ok())
    return false;
  scratch.edge.used = true;
  if (call.rows == 1 && edge_is_hot(scratch)) {
    edge.hot.offer(keys[0], false, 1, [&](std::vector<uint8_t>& bytes) { return encode_row(call, bytes); });
  }
  return edge_lookup(admission, call.options, first_id, scratch, status, tag);
}

bool ServedModel::edge_answers(const Admission& admission, const wire::VectorsCall& call, uint64_t first_id,
                               Scratch& scratch, Status* status, uint64_t* tag) {
  ServedEdge& edge = *edge_;
  std::vector<Key128>& keys = scratch.edge.keys;
  if (keys.size() < call.rows) keys.resize(call.rows);
  const size_t bytes = n_features_ * sizeof(float);
  for (uint32_t r = 0; r < call.rows; ++r) {
    SipHash128 hash = edge.vectors_start;
    hash.add(call.data + r * bytes, bytes);
    hash.finish(&keys[r].lo, &keys[r].hi);
  }
  scratch.edge.used = true;
  if (call.rows == 1 && bytes <= HotInputs::kMaxBytes && edge_is_hot(scratch)) {
    edge.hot.offer(keys[0], true, 1, [&](std::vector<uint8_t>& row) {
      row.assign(call.data, call.data + bytes);
      return true;
    });
  }
  return edge_lookup(admission, call.options, first_id, scratch, status, tag);
}

// At random: every n-th request would miss inputs that come in turn.
bool ServedModel::edge_is_hot(Scratch& scratch) const {
  if (edge_->cache->frequency(scratch.edge.keys[0]) < 2) return false;
  uint64_t& random = scratch.edge.random;
  random = random * 6364136223846793005U + 1442695040888963407U;
  return (random >> 33) % edge_->config.hot_sample == 0;
}

void ServedModel::fit_edge(EdgeScratch& s, size_t rows) const {
  if (s.scores.size() < rows * n_outputs_) s.scores.resize(rows * n_outputs_);
  if (s.features.size() < n_features_) s.features.resize(n_features_);
  if (s.times.size() < n_views_) s.times.resize(n_views_);
  if (s.row_keys.size() < n_views_) s.row_keys.resize(n_views_);
  if (s.row_versions.size() < n_views_) s.row_versions.resize(n_views_);
}

bool ServedModel::edge_lookup(const Admission& admission, const wire::Options& options, uint64_t first_id,
                              Scratch& scratch, Status* status, uint64_t* tag) {
  ServedEdge& edge = *edge_;
  scratch.edge.puts = edge.puts.load(std::memory_order_relaxed);
  const size_t n = admission.rows;
  GatheredRows& found = scratch.gathered;
  fit_gathered(found, n);
  EdgeScratch& s = scratch.edge;
  fit_edge(s, n);
  for (size_t r = 0; r < n; ++r) {
    EdgeRow row{&s.scores[r * n_outputs_], &found.rows[r * n_features_],
                found.event_time.data() + r * n_views_, s.row_keys.data(), s.row_versions.data()};
    if (edge.cache->get(s.keys[r], admission.now_us, admission.received_ns, &row) != EdgeRead::kHit)
      return false;
    found.status[r] = row.status;
  }
  read_request_ids(options, admission.rows, first_id, scratch);
  const std::lock_guard lock(mutex_);
  if (admission.rows > free_rows_) return false;  // the way of the others says so
  uint32_t index = kNone;
  int64_t retry_after_ms;  // of the breaker alone, which does not matter here
  *status = new_request(admission, &index, &retry_after_ms, false);
  if (!status->is_ok()) return true;
  place_rows(index, found.rows.data(), found.status.data(), found.event_time.data(),
             scratch.request_ids.data());
  link(index);
  *tag = tag_of(index, requests_[index].generation);
  edge_end_with(index, s.scores.data());
  return true;
}

// Ends a request whose rows are in place, with these scores.
void ServedModel::edge_end_with(uint32_t index, const double* scores) {
  uint32_t row = requests_[index].first_row;
  for (uint32_t r = 0; r < requests_[index].rows; ++r, row = next_row_[row])
    std::copy_n(scores + r * n_outputs_, n_outputs_, &scores_[row * n_outputs_]);
  end(index, {});
}

// Whether the request, of one row, needs no run of its own: an equal one has just been answered, or is in
// flight.
bool ServedModel::edge_shares(uint32_t index, const float* rows, const uint8_t* row_status,
                              const int64_t* event_time, Scratch& scratch) {
  ServedEdge& edge = *edge_;
  EdgeScratch& s = scratch.edge;
  Request& request = requests_[index];
  if (!s.used || request.rows != 1 || free_rows_ == 0) return false;
  const size_t bytes = n_features_ * sizeof(float);
  const uint32_t leader = edge.flights.leader(s.keys[0]);
  if (leader != SingleFlight::kNone) {
    if (std::memcmp(&rows_[requests_[leader].first_row * n_features_], rows, bytes) != 0) return false;
    place_rows(index, rows, row_status, event_time, scratch.request_ids.data());
    edge_note_sources(index, scratch);
    if (request.state != State::kParked) parked_queue_.push(requests_, index);
    request.state = State::kFollowing;
    edge.flights.follow(index, leader);
    ++edge.coalesced;
    return true;
  }
  if (edge.puts.load(std::memory_order_relaxed) == s.puts) return false;
  fit_edge(s, 1);
  EdgeRow row{s.scores.data(), s.features.data(), s.times.data(), s.row_keys.data(), s.row_versions.data()};
  if (edge.cache->peek(s.keys[0], request.now_us, mono_ns(), &row) != EdgeRead::kHit ||
      std::memcmp(s.features.data(), rows, bytes) != 0) {
    return false;
  }
  place_rows(index, rows, row_status, event_time, scratch.request_ids.data());
  ++edge.coalesced;
  edge_end_with(index, s.scores.data());
  return true;
}

// The request has its place in the lane: equal ones may follow it, and its rows enter the cache.
void ServedModel::edge_queued(uint32_t index, Scratch& scratch) {
  if (!scratch.edge.used) return;
  edge_note_sources(index, scratch);
  const Key128& key = scratch.edge.keys[0];
  if (requests_[index].rows == 1 && edge_->flights.leader(key) == SingleFlight::kNone)
    edge_->flights.lead(index, key);
}

void ServedModel::edge_note_sources(uint32_t index, const Scratch& scratch) {
  ServedEdge& edge = *edge_;
  const GatheredRows& gathered = scratch.gathered;
  uint32_t at = requests_[index].first_row;
  for (uint32_t r = 0; r < requests_[index].rows; ++r, at = next_row_[at]) {
    const bool whole = gathered.with_sources;  // false: vectors, made of no cached row and always valid
    edge.valid_from[at] = whole ? gathered.valid_from[r] : std::numeric_limits<int64_t>::min();
    edge.valid_until[at] = whole ? gathered.valid_until[r] : std::numeric_limits<int64_t>::max();
    edge.fills[at] = edge.valid_from[at] < edge.valid_until[at] ? 1 : 0;
    edge.keys[at] = scratch.edge.keys[r];
    for (size_t v = 0; v < n_views_; ++v) {
      edge.row_keys[at * n_views_ + v] = whole ? gathered.row_keys[r * n_views_ + v] : Key128{};
      edge.row_versions[at * n_views_ + v] = whole ? gathered.row_versions[r * n_views_ + v] : 0;
    }
  }
}

// Rows `first` and on of the request have scores.
void ServedModel::edge_fill(Request& request, const Piece& piece, int64_t now_ns) {
  ServedEdge& edge = *edge_;
  uint32_t at = row_at(request, piece.first_row);
  for (uint32_t r = 0; r < piece.rows; ++r) {
    if (edge.fills[at] != 0) {
      const EdgeRow row{&scores_[at * n_outputs_],
                        &rows_[at * n_features_],
                        event_time_.data() + at * n_views_,
                        edge.row_keys.data() + at * n_views_,
                        edge.row_versions.data() + at * n_views_,
                        edge.valid_from[at],
                        edge.valid_until[at],
                        row_status_[at]};
      (void)edge.cache->put(edge.keys[at], row, now_ns);
      edge.puts.fetch_add(1, std::memory_order_relaxed);
    }
    if (r + 1 < piece.rows) at = next_row_[at];
  }
}

// A request ends: what becomes of those that follow it. Called by end(), before the request lets go of its
// rows. Followers that take over are queued later, by edge_adopt(), for the lane may be in the middle of a
// report.
void ServedModel::edge_ended(uint32_t index, const Status& status) {
  SingleFlight& flights = edge_->flights;
  if (!flights.in_group(index)) return;
  if (!flights.leads(index)) return flights.leave(index);
  const bool ran = status.is_ok() || status.code == Code::kInternal;
  if (ran || stopping_) {
    const Request& leader = requests_[index];
    for (uint32_t f; (f = flights.first_follower(index)) != SingleFlight::kNone;) {
      flights.leave(f);
      if (!ran) continue;  // stop() ends each
      Request& follower = requests_[f];
      follower.formed_ns = std::max(leader.formed_ns, follower.received_ns);
      follower.finished_ns = leader.finished_ns;
      follower.admitted_ns = std::max(follower.received_ns, follower.decoded_ns);
      follower.run_ns = std::clamp<int64_t>(leader.finished_ns - follower.admitted_ns, 0, leader.run_ns);
      if (status.is_ok()) {
        edge_end_with(f, &scores_[leader.first_row * n_outputs_]);
      } else {
        end(f, status);
      }
    }
    (void)flights.hand_over(index);
    return;
  }
  const uint32_t next = flights.hand_over(index);
  if (next != SingleFlight::kNone) edge_->orphans.push_back(next);
}

void ServedModel::edge_adopt() {
  bool queued = false;
  while (!edge_->orphans.empty()) {
    const uint32_t index = edge_->orphans.back();
    edge_->orphans.pop_back();
    Request& request = requests_[index];
    if (request.state != State::kFollowing || !edge_->flights.leads(index)) continue;
    Status status = queue_placed(index, &request.retry_after_ms);
    if (status.is_ok()) {
      queued = true;
    } else {
      end(index, std::move(status));  // the next one is an orphan now
    }
  }
  if (queued) work_.notify_one();
}

std::vector<HotInputs::Input> ServedModel::hot_inputs() const {
  if (edge_ == nullptr) return {};
  std::vector<HotInputs::Input> top = edge_->hot.top();
  if (top.size() > edge_->config.precompute) top.resize(edge_->config.precompute);
  return top;
}

// The fingerprint and the model row of a hot input; false if it cannot be had without a load.
bool ServedModel::edge_row_of(const HotInputs::Input& input, int64_t now_us, Scratch& scratch, Key128* key,
                              std::vector<FeatureMiss>* misses) const {
  GatheredRows& row = scratch.gathered;
  if (input.vectors) {
    if (input.bytes.size() != n_features_ * sizeof(float)) return false;
    SipHash128 hash = edge_->vectors_start;
    hash.add(input.bytes.data(), input.bytes.size());
    hash.finish(&key->lo, &key->hi);
    fit_gathered(row, 1);
    std::memcpy(row.rows.data(), input.bytes.data(), input.bytes.size());
    row.status[0] = 0;
    std::fill_n(row.event_time.begin(), n_views_, std::numeric_limits<int64_t>::min());
    row.with_sources = false;
    return true;
  }
  if (!edge_->service) return false;
  const uint8_t* bytes = input.bytes.data();
  wire::PredictCall& call = scratch.resumed;
  row.with_sources = true;
  return decode_predict({bytes, bytes + input.bytes.size()}, &call).is_ok() && call.rows == 1 &&
         plan_->fingerprint(call, now_us, edge_->service_start, scratch.plan, key).is_ok() &&
         plan_->gather(call, now_us, mono_ns(), true, nullptr, scratch.plan, &row, misses).is_ok() &&
         misses->empty();
}

std::vector<FeatureMiss> ServedModel::hot_misses(const std::vector<HotInputs::Input>& inputs, int64_t now_us,
                                                 Scratch& scratch) const {
  std::vector<FeatureMiss> all;
  if (edge_ == nullptr || !edge_->active.load(std::memory_order_relaxed)) return all;
  Key128 key;
  for (const HotInputs::Input& input : inputs) {
    scratch.misses.clear();
    (void)edge_row_of(input, now_us, scratch, &key, &scratch.misses);
    for (const FeatureMiss& miss : scratch.misses) {
      const auto same = [&](const FeatureMiss& m) { return m.view == miss.view && m.key == miss.key; };
      if (std::none_of(all.begin(), all.end(), same)) all.push_back(miss);
    }
  }
  return all;
}

size_t ServedModel::precompute(const std::vector<HotInputs::Input>& inputs, int64_t now_us, int64_t limit_ns,
                               Scratch& scratch) {
  if (edge_ == nullptr || !edge_->active.load(std::memory_order_relaxed)) return 0;
  ServedEdge& edge = *edge_;
  const int64_t until = mono_ns() + limit_ns;
  size_t most = config_.lane.policy.max_batch_rows;
  {
    const std::lock_guard lock(mutex_);
    while (most > 1 && lane_.run_time().predict(most) > kPrecomputeRunNs) most /= 2;
  }
  struct Made {
    Key128 key;
    uint64_t count;
    const HotInputs::Input* input;
    std::vector<float> features;
    std::vector<int64_t> event_time;
    std::vector<Key128> row_keys;
    std::vector<uint64_t> row_versions;
    int64_t valid_from, valid_until;
    uint8_t status;
  };
  std::vector<Made> batch;
  std::vector<float> rows(most * n_features_), features(n_features_);
  std::vector<double> scores(most * n_outputs_);
  std::vector<int64_t> times(n_views_);
  std::vector<Key128> row_keys(n_views_);
  std::vector<uint64_t> row_versions(n_views_);
  size_t filled = 0;
  const auto run = [&] {
    if (batch.empty()) return true;
    std::unique_lock lock(mutex_);
    // Between the runs of the lane, when nothing waits.
    while (!stopping_ && (!may_run() || !breaker_.closed() || breaker_.running() ||
                          lane_.running_batches() > 0 || lane_.queued_rows() > 0)) {
      if (mono_ns() >= until) return false;
      lock.unlock();
      std::this_thread::sleep_for(std::chrono::microseconds(100));
      lock.lock();
    }
    if (stopping_) return false;
    edge.precomputing = true;
    lock.unlock();
    for (size_t i = 0; i < batch.size(); ++i)
      std::copy(batch[i].features.begin(), batch[i].features.end(), &rows[i * n_features_]);
    const Status status = model_->run(rows.data(), batch.size(), scores.data());
    lock.lock();
    edge.precomputing = false;
    work_.notify_all();
    if (!status.is_ok()) return false;
    for (size_t i = 0; i < batch.size(); ++i) {
      Made& made = batch[i];
      const EdgeRow row{
          &scores[i * n_outputs_],  made.features.data(), made.event_time.data(), made.row_keys.data(),
          made.row_versions.data(), made.valid_from,      made.valid_until,       made.status};
      if (edge.cache->frequency(made.key) == 0) {  // of another version's traffic
        edge.cache->record(made.key,
                           static_cast<uint32_t>(std::min<uint64_t>(made.count, kPrecomputeNotices)));
        edge.hot.offer(made.key, made.input->vectors, made.count, [&](std::vector<uint8_t>& bytes) {
          bytes = made.input->bytes;
          return true;
        });
      }
      const auto finite = [](double score) { return std::isfinite(score); };
      if (!std::all_of(row.scores, row.scores + n_outputs_, finite)) continue;  // a run of it fails
      const EdgePut put = edge.cache->put(made.key, row, mono_ns());
      if (put == EdgePut::kStored || put == EdgePut::kReplaced) ++filled;
      edge.puts.fetch_add(1, std::memory_order_relaxed);
    }
    batch.clear();
    return true;
  };
  for (const HotInputs::Input& input : inputs) {
    if (mono_ns() >= until) break;
    Key128 key;
    scratch.misses.clear();
    if (!edge_row_of(input, now_us, scratch, &key, &scratch.misses)) continue;
    EdgeRow known{scores.data(), features.data(), times.data(), row_keys.data(), row_versions.data()};
    if (edge.cache->peek(key, now_us, mono_ns(), &known) == EdgeRead::kHit) continue;
    const GatheredRows& row = scratch.gathered;
    Made made{key,
              input.count,
              &input,
              {row.rows.begin(), row.rows.begin() + static_cast<ptrdiff_t>(n_features_)},
              {row.event_time.begin(), row.event_time.begin() + static_cast<ptrdiff_t>(n_views_)},
              row_keys,
              row_versions,
              std::numeric_limits<int64_t>::min(),
              std::numeric_limits<int64_t>::max(),
              row.status[0]};
    std::fill(made.row_versions.begin(), made.row_versions.end(), 0);
    if (row.with_sources) {
      std::copy_n(row.row_keys.begin(), n_views_, made.row_keys.begin());
      std::copy_n(row.row_versions.begin(), n_views_, made.row_versions.begin());
      made.valid_from = row.valid_from[0];
      made.valid_until = row.valid_until[0];
    }
    batch.push_back(std::move(made));
    if (batch.size() == most && !run()) break;
  }
  (void)run();
  const std::lock_guard lock(mutex_);
  edge.precomputed += filled;
  return filled;
}

void ServedModel::edge_stats(EdgeStats* out) const {
  *out = {};
  if (edge_ == nullptr) return;
  out->enabled = true;
  out->active = edge_->active.load(std::memory_order_relaxed);
  out->coalesced = edge_->coalesced;
  out->precomputed = edge_->precomputed;
}

}  // namespace penstock
