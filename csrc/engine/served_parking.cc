// Requests of a ServedModel that wait for rows which the caches lack.
#include <algorithm>

#include "engine/served_model.h"

namespace penstock {

Status ServedModel::park(const Admission& admission, std::string_view params, bool use_cache,
                         const std::vector<FeatureMiss>& misses, int64_t* retry_after_ms, uint64_t* tag,
                         uint64_t first_id) {
  const std::lock_guard lock(mutex_);
  uint32_t index = kNone;
  if (Status status = new_request(admission, &index, retry_after_ms); !status.is_ok()) return status;
  Request& request = requests_[index];
  const size_t bytes =
      params.size() + misses.size() * sizeof(FeatureMiss) + n_views_ * request.rows * sizeof(int64_t);
  PeerRecord& peer = peers_[request.peer];
  if (!within_share(peer.parked_bytes, bytes, config_.max_parked_bytes - parked_bytes_,
                    config_.max_parked_bytes)) {
    *retry_after_ms = 1;
    Status status{Code::kResourceExhausted, "too many requests wait for the feature store"};
    count_end(request, status.code);
    free_request(index);
    return status;
  }
  request.parked = std::make_unique<Parked>();
  request.parked->params.assign(params);
  request.parked->misses = misses;
  request.parked->use_cache = use_cache;
  request.parked->first_id = first_id;
  request.parked->overlay.index.assign(n_views_ * request.rows, -1);
  request.state = State::kParked;
  request.parked->bytes = bytes;
  parked_bytes_ += bytes;
  peer.parked_bytes += bytes;
  ++parked_;
  missed_rows_ += misses.size();
  parked_queue_.push(requests_, index);
  link(index);
  *tag = tag_of(index, request.generation);
  events_->missed(shared_from_this(), *tag);
  return {};
}

bool ServedModel::parked_misses(uint64_t tag, std::vector<FeatureMiss>* misses, int64_t* now_us,
                                bool* fill_cache) {
  const std::lock_guard lock(mutex_);
  const Request* request = find(tag);
  if (request == nullptr || request->state != State::kParked) return false;
  *misses = request->parked->misses;
  *now_us = request->now_us;
  *fill_cache = request->parked->use_cache;
  return true;
}

void ServedModel::resume(uint64_t tag, const std::vector<const uint64_t*>& words,
                         const std::vector<RowMeta>& meta, Scratch& scratch) {
  // The parked part is taken out, so that the rows are gathered without the lock.
  std::unique_ptr<Parked> parked;
  uint32_t rows;
  int64_t now_us;
  {
    const std::lock_guard lock(mutex_);
    Request* request = find(tag);
    if (request == nullptr || request->state != State::kParked) return;
    parked = std::move(request->parked);
    parked_bytes_ -= parked->bytes;
    peers_[request->peer].parked_bytes -= parked->bytes;
    rows = request->rows;
    now_us = request->now_us;
  }
  for (size_t m = 0; m < parked->misses.size(); ++m) {
    const FeatureMiss& miss = parked->misses[m];
    Overlay& overlay = parked->overlay;
    overlay.index[size_t{miss.view} * rows + miss.row] = static_cast<int64_t>(overlay.words.size());
    overlay.words.emplace_back(words[m], words[m] + plan_->row_words(miss.view));
    overlay.meta.push_back(meta[m]);
  }
  ++parked->loads;
  const auto* bytes = reinterpret_cast<const uint8_t*>(parked->params.data());
  Status status = decode_predict({bytes, bytes + parked->params.size()}, &scratch.resumed);
  scratch.edge.used = false;
  if (status.is_ok() && parked->use_cache && edge_in_use() && edge_->service) {
    scratch.edge.keys.resize(std::max<size_t>(scratch.edge.keys.size(), rows));
    scratch.edge.used = plan_
                            ->fingerprint(scratch.resumed, now_us, edge_->service_start, scratch.plan,
                                          scratch.edge.keys.data())
                            .is_ok();
    scratch.edge.puts = ServedEdge::kNeverLooked;
  }
  scratch.gathered.with_sources = scratch.edge.used;
  if (status.is_ok()) {
    status = plan_->gather(scratch.resumed, now_us, mono_ns(), parked->use_cache, &parked->overlay,
                           scratch.plan, &scratch.gathered, &scratch.misses);
  }
  if (status.is_ok() && !scratch.misses.empty() && parked->loads >= kMaxLoads) {
    // Rows leave the cache faster than others are loaded: the rest is loaded for this request alone.
    parked->use_cache = false;
    status = plan_->gather(scratch.resumed, now_us, mono_ns(), false, &parked->overlay, scratch.plan,
                           &scratch.gathered, &scratch.misses);
  }
  if (status.is_ok() && scratch.misses.empty() && samples_.chooses(scratch.resumed)) {
    samples_.add(parked->params, now_us, wall_clock_us(), rows, scratch.gathered.rows.data(), n_features_);
  }
  if (status.is_ok()) read_request_ids(scratch.resumed.options, rows, parked->first_id, scratch);

  const std::lock_guard lock(mutex_);
  Request* request = find(tag);
  if (request == nullptr || request->state != State::kParked) return;  // it ended meanwhile
  const auto index = static_cast<uint32_t>(tag);
  if (status.is_ok() && !scratch.misses.empty()) {
    // Rows that were cached before have gone: load those too.
    missed_rows_ += scratch.misses.size();
    parked->misses = scratch.misses;
    parked_bytes_ += parked->bytes;
    peers_[request->peer].parked_bytes += parked->bytes;
    request->parked = std::move(parked);
    events_->missed(shared_from_this(), tag);
    return;
  }
  if (status.is_ok()) {
    status = enter(index, scratch.gathered.rows.data(), scratch.gathered.status.data(),
                   scratch.gathered.event_time.data(), scratch, &request->retry_after_ms);
  }
  if (!status.is_ok()) {
    end(index, status);
  } else {
    work_.notify_one();
  }
}

void ServedModel::fail_parked(uint64_t tag, Status status) {
  const std::lock_guard lock(mutex_);
  const Request* request = find(tag);
  if (request == nullptr || request->state != State::kParked) return;
  end(static_cast<uint32_t>(tag), std::move(status));
}

}  // namespace penstock
