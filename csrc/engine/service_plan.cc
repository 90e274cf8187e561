#include "engine/service_plan.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>
#include <limits>

namespace penstock {
namespace {

constexpr uint8_t kPresent = 0;
constexpr uint8_t kNotFound = 2;
constexpr size_t kMaxViews = 64;

std::atomic<uint64_t> last_id{0};  // no partner: only distinctness matters

Status bad(std::string text) {
  return Status::invalid(std::move(text));
}

std::string names_of(const std::vector<PlanColumn>& columns) {
  std::string names;
  for (const PlanColumn& column : columns) names += (names.empty() ? "" : ", ") + column.name;
  return names.empty() ? "none" : names;
}

}  // namespace

ServicePlan::ServicePlan(ServicePlanSpec spec)
    : id_(last_id.fetch_add(1, std::memory_order_relaxed) + 1), spec_(std::move(spec)) {}

Status ServicePlan::create(ServicePlanSpec spec, std::shared_ptr<const ServicePlan>* out) {
  auto plan = std::shared_ptr<ServicePlan>(new ServicePlan(std::move(spec)));
  if (Status status = plan->resolve(); !status.is_ok()) return status;
  *out = std::move(plan);
  return {};
}

Status ServicePlan::resolve() {
  if (spec_.program == nullptr) return bad("the plan has no program");
  if (spec_.views.size() > kMaxViews || spec_.entities.size() > wire::Columns::kMax ||
      spec_.inputs.size() > wire::Columns::kMax) {
    return bad("the plan has too many views or columns; expected at most 64 of each");
  }
  for (const PlanColumn& entity : spec_.entities) {
    if (entity.dtype != FeatureDtype::kI64 && entity.dtype != FeatureDtype::kString) {
      return bad("join key '" + entity.name + "' is " + dtype_name(entity.dtype) +
                 "; expected int64 or string");
    }
  }
  for (const PlanColumn& input : spec_.inputs) {
    if (input.dtype == FeatureDtype::kString)
      return bad("request input '" + input.name + "' is a string; expected a number, bool or time");
  }
  for (const PlanView& view : spec_.views) {
    RowSchema schema;
    if (Status status = RowSchema::create(view.fields, &schema); !status.is_ok()) return status;
    if (view.cache == nullptr || view.cache->row_words() != schema.row_words()) {
      return bad("view '" + view.name + "': its cache does not hold rows of " +
                 std::to_string(schema.row_words()) + " words");
    }
    for (const uint32_t column : view.key_columns) {
      if (column >= spec_.entities.size()) return bad("view '" + view.name + "' reads an unknown key column");
    }
    schemas_.push_back(std::move(schema));
  }
  for (const Field& input : spec_.program->inputs()) {
    if (input.name == "now") {
      inputs_.push_back({Source::kNow, 0, 0});
      continue;
    }
    const size_t colon = input.name.find(':');
    const std::string owner = input.name.substr(0, colon);
    const std::string column = colon == std::string::npos ? "" : input.name.substr(colon + 1);
    bool found = false;
    for (uint32_t v = 0; v < spec_.views.size() && !found; ++v) {
      if (spec_.views[v].name != owner) continue;
      for (uint32_t f = 0; f < spec_.views[v].fields.size() && !found; ++f) {
        const Field& field = spec_.views[v].fields[f];
        if (field.name != column) continue;
        if (field.dtype != input.dtype) return bad("program input '" + input.name + "' has another dtype");
        inputs_.push_back({Source::kStored, v, f});
        found = true;
      }
    }
    for (uint32_t i = 0; i < spec_.inputs.size() && !found; ++i) {
      if (owner != spec_.request_source || spec_.inputs[i].name != column) continue;
      if (spec_.inputs[i].dtype != input.dtype)
        return bad("program input '" + input.name + "' has another dtype");
      inputs_.push_back({Source::kRequest, 0, i});
      found = true;
    }
    if (!found) return bad("program input '" + input.name + "' is no column of a view or of the request");
  }
  return {};
}

void ServicePlan::fit(Scratch& scratch) const {
  if (scratch.plan_id == id_) return;
  scratch.plan_id = 0;
  scratch.words.resize(spec_.views.size());
  for (size_t v = 0; v < spec_.views.size(); ++v) scratch.words[v].resize(kBlockRows * row_words(v));
  scratch.inputs.resize(inputs_.size());
  scratch.outputs.resize(n_features());
  scratch.program = spec_.program->make_scratch();
  scratch.ints.resize(spec_.entities.size() * kBlockRows);
  scratch.text.resize(spec_.entities.size() * kBlockRows);
  scratch.nulls.resize(spec_.entities.size());
  scratch.now_buckets.resize(spec_.program->n_now_buckets());
  scratch.plan_id = id_;
}

Status ServicePlan::match(const wire::Columns& given, const char* group,
                          const std::vector<PlanColumn>& wanted, const wire::Column** found) const {
  for (size_t i = 0; i < wanted.size(); ++i) {
    found[i] = nullptr;
    for (uint32_t c = 0; c < given.size; ++c) {
      if (given.column[c].name == wanted[i].name) found[i] = &given.column[c];
    }
    if (found[i] == nullptr) {
      return bad(std::string(group) + "." + wanted[i].name + " is missing; expected " +
                 dtype_name(wanted[i].dtype));
    }
  }
  if (given.size == wanted.size()) return {};
  for (uint32_t c = 0; c < given.size; ++c) {
    const auto known = [&](const PlanColumn& column) { return column.name == given.column[c].name; };
    if (std::none_of(wanted.begin(), wanted.end(), known)) {
      return bad(std::string(group) + "." + std::string(given.column[c].name) +
                 " is unknown; expected columns: " + names_of(wanted));
    }
  }
  return {};
}

Status ServicePlan::read_keys(wire::Cursor* cursors, const wire::Column* const* columns, uint32_t from,
                              size_t n, Scratch& scratch) const {
  for (size_t e = 0; e < spec_.entities.size(); ++e) {
    const wire::Column& column = *columns[e];
    uint64_t nulls = 0;
    for (size_t r = 0; r < n; ++r) {
      const wire::ValueLabel label{"entities", column.name, static_cast<uint32_t>(from + r), column.is_list};
      bool null = false;
      Status status;
      if (spec_.entities[e].dtype == FeatureDtype::kI64) {
        status = read_int64(cursors[e], label, &scratch.ints[e * kBlockRows + r], &null);
      } else {
        status = read_str(cursors[e], label, &scratch.text[e * kBlockRows + r], &null);
      }
      if (!status.is_ok()) return status;
      nulls |= uint64_t{null} << r;
    }
    scratch.nulls[e] = nulls;
  }
  return {};
}

Status ServicePlan::read_input(size_t input, wire::Cursor& cursor, const wire::Column& column, uint32_t from,
                               size_t n, Block* block) const {
  const FeatureDtype dtype = spec_.inputs[input].dtype;
  block->valid = 0;
  for (size_t r = 0; r < n; ++r) {
    const wire::ValueLabel label{"inputs", column.name, static_cast<uint32_t>(from + r), column.is_list};
    bool null = false;
    Status status;
    block->i64[r] = 0;
    if (is_float(dtype)) {
      double value = 0;
      status = read_f64(cursor, label, &value, &null);
      block->f64[r] = dtype == FeatureDtype::kF32 ? static_cast<double>(static_cast<float>(value)) : value;
    } else if (dtype == FeatureDtype::kBool) {
      bool value = false;
      status = read_bool(cursor, label, &value, &null);
      block->i64[r] = value;
    } else {
      int64_t value = 0;
      status = dtype == FeatureDtype::kTimestamp ? read_time(cursor, label, &value, &null)
                                                 : read_int64(cursor, label, &value, &null);
      block->i64[r] = value;
    }
    if (!status.is_ok()) return status;
    block->valid |= uint64_t{!null} << r;
  }
  return {};
}

void ServicePlan::read_view(size_t view, uint32_t from, size_t n, uint32_t total, int64_t now_us,
                            int64_t mono_ns, bool use_cache, const Overlay* overlay, Scratch& scratch,
                            GatheredRows* out, std::vector<FeatureMiss>* misses) const {
  const PlanView& plan = spec_.views[view];
  const uint32_t words = row_words(view);
  uint64_t* rows = scratch.words[view].data();
  Key128 keys[kBlockRows];
  RowMeta meta[kBlockRows];
  ReadStatus read[kBlockRows];
  uint64_t versions[kBlockRows];
  size_t n_keys = 0;
  uint64_t null_keys = 0;
  for (const uint32_t e : plan.key_columns) null_keys |= scratch.nulls[e];
  KeyHasher hasher(spec_.key_seed);
  const bool lone_int =
      plan.key_columns.size() == 1 && spec_.entities[plan.key_columns[0]].dtype == FeatureDtype::kI64;
  for (size_t r = 0; r < n; ++r) {
    if (null_keys >> r & 1) continue;
    if (plan.key_columns.empty()) {
      keys[n_keys] = Key128{};
    } else if (lone_int) {
      keys[n_keys] = key_of_int(scratch.ints[plan.key_columns[0] * kBlockRows + r]);
    } else {
      hasher.reset();
      for (const uint32_t e : plan.key_columns) {
        if (spec_.entities[e].dtype == FeatureDtype::kI64) {
          hasher.add_int(scratch.ints[e * kBlockRows + r]);
        } else {
          hasher.add_str(scratch.text[e * kBlockRows + r]);
        }
      }
      keys[n_keys] = hasher.finish();
    }
    ++n_keys;
  }
  // Rows of the cache come in key order; with null keys between them they move up to their places, last
  // first.
  if (use_cache) {
    plan.cache->get_many(keys, n_keys, now_us, mono_ns, rows, read, meta,
                         out->with_sources ? versions : nullptr);
  } else {
    std::fill_n(read, n_keys, ReadStatus::kMiss);
  }
  const size_t views = n_views();
  size_t k = n_keys;
  for (size_t r = n; r-- > 0;) {
    uint64_t* row = rows + r * words;
    int64_t* event_time = &out->event_time[(from + r) * views + view];
    if (null_keys >> r & 1) {
      std::memset(row, 0, words * sizeof(uint64_t));
      row[0] = kNotFound;
      *event_time = std::numeric_limits<int64_t>::min();
    } else {
      --k;
      const int64_t entry = overlay == nullptr ? -1 : overlay->index[view * total + from + r];
      if (entry >= 0) {
        // A loaded row is one that the cache holds if that has the same bits.
        const RowMeta& loaded = overlay->meta[static_cast<size_t>(entry)];
        if (out->with_sources &&
            (read[k] != ReadStatus::kHit || std::memcmp(&meta[k], &loaded, sizeof loaded) != 0 ||
             std::memcmp(rows + k * words, overlay->words[static_cast<size_t>(entry)].data(),
                         words * sizeof(uint64_t)) != 0)) {
          out->valid_until[from + r] = std::numeric_limits<int64_t>::min();
        }
        std::memcpy(row, overlay->words[static_cast<size_t>(entry)].data(), words * sizeof(uint64_t));
        *event_time = overlay->meta[static_cast<size_t>(entry)].event_time;
      } else if (read[k] == ReadStatus::kHit) {
        if (k != r) std::memmove(row, rows + k * words, words * sizeof(uint64_t));
        *event_time = meta[k].event_time;
      } else {
        misses->push_back({static_cast<uint32_t>(view), static_cast<uint32_t>(from + r), keys[k]});
        continue;
      }
      if (out->with_sources && read[k] == ReadStatus::kHit) {
        out->valid_from[from + r] = std::max(out->valid_from[from + r], meta[k].valid_from);
        out->valid_until[from + r] = std::min(out->valid_until[from + r], meta[k].valid_until);
        out->row_keys[(from + r) * views + view] = keys[k];
        out->row_versions[(from + r) * views + view] = versions[k];
      }
    }
    const auto status = static_cast<uint8_t>(row[0] & 0xff);
    out->status[from + r] = std::max(out->status[from + r], status);
  }
}

Status ServicePlan::gather(const wire::PredictCall& call, int64_t now_us, int64_t mono_ns, bool use_cache,
                           const Overlay* overlay, Scratch& scratch, GatheredRows* out,
                           std::vector<FeatureMiss>* misses) const {
  fit(scratch);
  misses->clear();
  const wire::Column* entities[wire::Columns::kMax];
  const wire::Column* inputs[wire::Columns::kMax];
  wire::Cursor entity_at[wire::Columns::kMax];
  wire::Cursor input_at[wire::Columns::kMax];
  if (Status status = match(call.entities, "entities", spec_.entities, entities); !status.is_ok())
    return status;
  if (Status status = match(call.inputs, "inputs", spec_.inputs, inputs); !status.is_ok()) return status;
  for (size_t e = 0; e < spec_.entities.size(); ++e) entity_at[e] = entities[e]->cursor();
  for (size_t i = 0; i < spec_.inputs.size(); ++i) input_at[i] = inputs[i]->cursor();

  const size_t width = n_features();
  if (out->rows.size() < call.rows * width) out->rows.resize(call.rows * width);
  if (out->event_time.size() < call.rows * n_views()) out->event_time.resize(call.rows * n_views());
  if (out->status.size() < call.rows) out->status.resize(call.rows);
  std::fill_n(out->status.begin(), call.rows, kPresent);
  if (out->with_sources) {
    out->valid_from.assign(call.rows, std::numeric_limits<int64_t>::min());
    out->valid_until.assign(call.rows, std::numeric_limits<int64_t>::max());
    out->row_keys.assign(call.rows * n_views(), Key128{});
    out->row_versions.assign(call.rows * n_views(), 0);
  }

  Block request[wire::Columns::kMax];
  for (uint32_t from = 0; from < call.rows; from += kBlockRows) {
    const size_t n = std::min<size_t>(kBlockRows, call.rows - from);
    if (Status status = read_keys(entity_at, entities, from, n, scratch); !status.is_ok()) return status;
    for (size_t i = 0; i < spec_.inputs.size(); ++i) {
      Status status = read_input(i, input_at[i], *inputs[i], from, n, &request[i]);
      if (!status.is_ok()) return status;
    }
    for (size_t v = 0; v < spec_.views.size(); ++v) {
      read_view(v, from, n, call.rows, now_us, mono_ns, use_cache, overlay, scratch, out, misses);
    }
    if (!misses->empty()) continue;  // the other blocks still report theirs
    for (size_t i = 0; i < inputs_.size(); ++i) {
      const Input& input = inputs_[i];
      Block& block = scratch.inputs[i];
      if (input.source == Source::kStored) {
        schemas_[input.view].load(input.index, scratch.words[input.view].data(), row_words(input.view), n,
                                  &block);
      } else if (input.source == Source::kRequest) {
        block = request[input.index];
      } else {
        std::fill_n(block.i64, n, now_us);
        block.valid = ~uint64_t{0};
      }
    }
    spec_.program->run(scratch.inputs.data(), n, scratch.outputs.data(), scratch.program);
    for (size_t f = 0; f < width; ++f) {
      store_f32(scratch.outputs[f], spec_.program->outputs()[f].dtype, n, &out->rows[from * width + f],
                width);
    }
  }
  if (spec_.error_on_missing && misses->empty()) {
    for (uint32_t r = 0; r < call.rows; ++r) {
      if (out->status[r] != kPresent) {
        return Status::not_found("row " + std::to_string(r) + " has an entity that is unknown or expired");
      }
    }
  }
  return {};
}

// Bytes: the calendar fields; which keys and inputs are null, a bit each; every integer key or length of a
// string key; every input; then the string keys. All but the last of a fixed size for one plan.
Status ServicePlan::fingerprint(const wire::PredictCall& call, int64_t now_us, const SipHash128& start,
                                Scratch& scratch, Key128* keys) const {
  fit(scratch);
  const wire::Column* entities[wire::Columns::kMax];
  const wire::Column* inputs[wire::Columns::kMax];
  wire::Cursor entity_at[wire::Columns::kMax];
  wire::Cursor input_at[wire::Columns::kMax];
  if (Status status = match(call.entities, "entities", spec_.entities, entities); !status.is_ok())
    return status;
  if (Status status = match(call.inputs, "inputs", spec_.inputs, inputs); !status.is_ok()) return status;
  const size_t n_entities = spec_.entities.size(), n_inputs = spec_.inputs.size();
  for (size_t e = 0; e < n_entities; ++e) entity_at[e] = entities[e]->cursor();
  for (size_t i = 0; i < n_inputs; ++i) input_at[i] = inputs[i]->cursor();
  SipHash128 common = start;
  spec_.program->now_buckets(now_us, scratch.program, scratch.now_buckets.data());
  common.add(scratch.now_buckets.data(), scratch.now_buckets.size() * sizeof(int64_t));
  Block request[wire::Columns::kMax];
  for (uint32_t from = 0; from < call.rows; from += kBlockRows) {
    const size_t n = std::min<size_t>(kBlockRows, call.rows - from);
    if (Status status = read_keys(entity_at, entities, from, n, scratch); !status.is_ok()) return status;
    for (size_t i = 0; i < n_inputs; ++i) {
      Status status = read_input(i, input_at[i], *inputs[i], from, n, &request[i]);
      if (!status.is_ok()) return status;
    }
    for (size_t r = 0; r < n; ++r) {
      uint64_t words[2 + 2 * wire::Columns::kMax] = {};
      size_t at = 2;
      for (size_t e = 0; e < n_entities; ++e, ++at) {
        const bool null = (scratch.nulls[e] >> r & 1) != 0;
        words[0] |= uint64_t{null} << e;
        if (null) continue;
        words[at] = spec_.entities[e].dtype == FeatureDtype::kI64
                        ? static_cast<uint64_t>(scratch.ints[e * kBlockRows + r])
                        : scratch.text[e * kBlockRows + r].size();
      }
      for (size_t i = 0; i < n_inputs; ++i, ++at) {
        const bool valid = (request[i].valid >> r & 1) != 0;
        words[1] |= uint64_t{valid} << i;
        if (!valid) continue;
        words[at] = is_float(spec_.inputs[i].dtype) ? std::bit_cast<uint64_t>(request[i].f64[r])
                                                    : static_cast<uint64_t>(request[i].i64[r]);
      }
      SipHash128 hash = common;
      hash.add(words, at * sizeof(uint64_t));
      for (size_t e = 0; e < n_entities; ++e) {
        if (spec_.entities[e].dtype == FeatureDtype::kI64 || (scratch.nulls[e] >> r & 1) != 0) continue;
        const std::string_view text = scratch.text[e * kBlockRows + r];
        hash.add(text.data(), text.size());
      }
      hash.finish(&keys[from + r].lo, &keys[from + r].hi);
    }
  }
  return {};
}

}  // namespace penstock
