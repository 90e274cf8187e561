#include "engine/miss_batch.h"

#include <algorithm>
#include <limits>
#include <map>
#include <tuple>

namespace penstock {
namespace {

// A row to load. Requests that take the rows of others share one entry a key, whose time is kAnyTime.
constexpr int64_t kAnyTime = std::numeric_limits<int64_t>::min();
struct Wanted {
  Key128 key;
  int64_t now_us;
  bool operator<(const Wanted& other) const {
    return std::tie(key.lo, key.hi, now_us) < std::tie(other.key.lo, other.key.hi, other.now_us);
  }
};

}  // namespace

MissBatch::View& MissBatch::view_of(const PlanView& view, uint32_t row_words, uint32_t* index) {
  uint32_t v = 0;
  while (v < views.size() && views[v].cache != view.cache) ++v;
  if (v == views.size()) views.push_back({view.loaded_as(), view.cache, row_words, {}, {}, {}, {}, {}});
  *index = v;
  return views[v];
}

void MissBatch::collect(const std::vector<MissTag>& tags, int64_t mono_ns) {
  std::vector<std::map<Wanted, uint32_t>> seen;
  std::vector<FeatureMiss> misses;
  std::vector<uint64_t> row;
  for (const MissTag& tag : tags) {
    Waiting request{tag, 0, {}};
    bool use_cache;
    if (!tag.model->parked_misses(tag.tag, &misses, &request.now_us, &use_cache)) continue;
    for (const FeatureMiss& miss : misses) {
      uint32_t v;
      const auto& plan = *tag.model->plan();
      View& view = view_of(plan.view(miss.view), plan.row_words(miss.view), &v);
      seen.resize(views.size());
      row.resize(std::max<size_t>(row.size(), view.row_words));
      RowMeta meta;
      if (use_cache && view.cache->peek(miss.key, request.now_us, mono_ns, row.data(), &meta)) {
        auto words = std::make_unique<uint64_t[]>(view.row_words);
        std::copy_n(row.data(), view.row_words, words.get());
        request.rows.push_back({v, static_cast<uint32_t>(view.found_meta.size()), true});
        view.found_words.push_back(std::move(words));
        view.found_meta.push_back(meta);
        continue;
      }
      const Wanted wanted{miss.key, tag.exact ? request.now_us : kAnyTime};
      const auto [at, fresh] = seen[v].try_emplace(wanted, static_cast<uint32_t>(view.keys.size()));
      if (fresh) {
        view.keys.push_back(miss.key);
        view.now_us.push_back(request.now_us);
        view.fill_cache.push_back(0);
      }
      view.now_us[at->second] = std::max(view.now_us[at->second], request.now_us);
      view.fill_cache[at->second] |= use_cache ? 1 : 0;
      request.rows.push_back({v, at->second, false});
    }
    waiting.push_back(std::move(request));
  }
}

std::vector<MissTag> MissBatch::finish(const std::vector<const uint64_t*>& rows,
                                       const std::vector<const RowMeta*>& meta, uint64_t stamp,
                                       int64_t mono_ns, uint32_t owner, ServedModel::Scratch& scratch) const {
  for (size_t v = 0; v < views.size(); ++v) {
    const View& view = views[v];
    for (size_t i = 0; i < view.keys.size(); ++i) {
      if (view.fill_cache[i])
        (void)view.cache->put(view.keys[i], rows[v] + i * view.row_words, meta[v][i], stamp, mono_ns, owner);
    }
  }
  std::vector<MissTag> again;
  std::vector<const uint64_t*> words;
  std::vector<RowMeta> metas;
  for (const Waiting& request : waiting) {
    words.clear();
    metas.clear();
    bool holds = true;
    for (const Row& row : request.rows) {
      const View& view = views[row.view];
      if (row.found) {
        words.push_back(view.found_words[row.index].get());
        metas.push_back(view.found_meta[row.index]);
        continue;
      }
      words.push_back(rows[row.view] + size_t{row.index} * view.row_words);
      metas.push_back(meta[row.view][row.index]);
      // Loaded for its own time, a row is taken as it is.
      const RowMeta& loaded = metas.back();
      holds = holds && (view.now_us[row.index] == request.now_us ||
                        (loaded.valid_from <= request.now_us && request.now_us < loaded.valid_until));
    }
    if (holds) {
      request.tag.model->resume(request.tag.tag, words, metas, scratch);
    } else {
      again.push_back({request.tag.model, request.tag.tag, true});
    }
  }
  return again;
}

}  // namespace penstock
