#include "engine/feature_reader.h"

#include <algorithm>

#include "wire/msgpack_reader.h"

namespace penstock {

FeatureReader::FeatureReader(std::shared_ptr<const ServicePlan> plan,
                             std::vector<std::shared_ptr<const EventTable>> tables)
    : plan_(std::move(plan)), tables_(std::move(tables)) {}

Status FeatureReader::parse(const uint8_t* params, size_t size, Work& work) const {
  wire::FrameScanner scanner(wire::ScanLimits{size_t{1} << 30, 8});
  if (scanner.scan(params, size) != wire::ScanResult::kComplete || scanner.message_bytes() != size)
    return Status::invalid("params is no whole MessagePack value");
  return decode_predict({params, params + size}, &work.call);
}

Status FeatureReader::read(int64_t now_us, int64_t mono_ns, const Overlay* loaded, Work& work,
                           float* out) const {
  const Status status =
      plan_->gather(work.call, now_us, mono_ns, true, loaded, work.scratch, &work.rows, &work.misses);
  if (!status.is_ok() || !work.misses.empty()) return status;
  std::copy_n(work.rows.rows.data(), work.call.rows * plan_->n_features(), out);
  return {};
}

void FeatureReader::compute(int64_t now_us, int64_t mono_ns, uint64_t stamp, unsigned threads, bool reset,
                            Work& work) const {
  if (reset) {
    work.computed.index.assign(plan_->n_views() * work.call.rows, -1);
    work.computed.words.clear();
    work.computed.meta.clear();
  }
  for (size_t v = 0; v < plan_->n_views(); ++v) {
    work.asked.clear();
    for (const FeatureMiss& miss : work.misses) {
      if (miss.view == v) work.asked.push_back(static_cast<uint32_t>(&miss - work.misses.data()));
    }
    if (!work.asked.empty()) compute_view(v, now_us, mono_ns, stamp, threads, work);
  }
}

void FeatureReader::compute_view(size_t view, int64_t now_us, int64_t mono_ns, uint64_t stamp,
                                 unsigned threads, Work& work) const {
  const RowSchema& schema = plan_->row_schema(view);
  const size_t n = work.asked.size(), fields = schema.fields().size(), stride = schema.row_words();
  work.keys.resize(2 * n);
  for (size_t i = 0; i < n; ++i) {
    const Key128& key = work.misses[work.asked[i]].key;
    work.keys[2 * i] = key.lo;
    work.keys[2 * i + 1] = key.hi;
  }
  work.now.assign(n, now_us);
  work.meta.resize(4 * n);
  work.status.resize(n);
  work.words.resize(n * stride);
  if (work.values.size() < fields) work.values.resize(fields);
  if (work.valid.size() < fields || work.n_valid < n) {
    work.n_valid = std::max(n, work.n_valid);
    work.valid.resize(std::max(fields, work.valid.size()));
    for (auto& flags : work.valid) flags = std::make_unique<bool[]>(work.n_valid);
  }
  RowsFound found;
  found.status = work.status.data();
  found.meta = work.meta.data();
  for (size_t f = 0; f < fields; ++f) {
    work.values[f].resize(n);
    found.values.push_back(work.values[f].data());
    found.valid.push_back(work.valid[f].get());
  }
  tables_[view]->rows_at({n, work.keys.data(), work.now.data(), nullptr, nullptr}, found, threads);
  // As it is stored, a row whose events are all later is NOT_FOUND.
  for (uint8_t& status : work.status) status = status == kRowFuture ? uint8_t{kRowNotFound} : status;
  schema.init(work.words.data(), stride, n, work.status.data());
  Block block;
  for (size_t from = 0; from < n; from += kBlockRows) {
    const size_t count = std::min(kBlockRows, n - from);
    for (size_t f = 0; f < fields; ++f) {
      block.valid = 0;
      for (size_t r = 0; r < count; ++r) {
        block.i64[r] = found.values[f][from + r].i;
        block.valid |= uint64_t{found.valid[f][from + r]} << r;
      }
      schema.store(f, block, count, work.words.data() + from * stride, stride);
    }
  }
  FeatureCache& cache = *plan_->view(view).cache;
  for (size_t i = 0; i < n; ++i) {
    const FeatureMiss& miss = work.misses[work.asked[i]];
    const uint64_t* row = work.words.data() + i * stride;
    const int64_t* m = work.meta.data() + 4 * i;
    const RowMeta meta{m[0], m[1], m[2], m[3]};
    cache.put(miss.key, row, meta, stamp, mono_ns, 0);
    work.computed.index[view * work.call.rows + miss.row] = static_cast<int64_t>(work.computed.words.size());
    work.computed.words.emplace_back(row, row + stride);
    work.computed.meta.push_back(meta);
  }
}

}  // namespace penstock
