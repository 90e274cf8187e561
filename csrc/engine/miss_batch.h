// The rows that parked requests lack, merged so that each key is loaded once.
//
// A request whose key another one lacks too takes part in its load if the row, loaded for the latest of their
// request times, holds at its own; else it is asked for again, exactly at its time. Rows that have come into
// the cache since the request missed them (by the load before, or by another process) are not loaded at all.
// Of the loader thread.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "engine/served_model.h"

namespace penstock {

// A parked request. exact: the rows of others do not hold at its time.
struct MissTag {
  std::shared_ptr<ServedModel> model;
  uint64_t tag;
  bool exact = false;
};

struct MissBatch {
  // keys, now_us, fill_cache: what to load. found: rows that need no load.
  struct View {
    std::string name;
    std::shared_ptr<FeatureCache> cache;
    uint32_t row_words;
    std::vector<Key128> keys;
    std::vector<int64_t> now_us;
    std::vector<uint8_t> fill_cache;
    std::vector<std::unique_ptr<uint64_t[]>> found_words;
    std::vector<RowMeta> found_meta;
  };
  struct Row {
    uint32_t view, index;
    bool found;
  };
  struct Waiting {
    MissTag tag;
    int64_t now_us;
    std::vector<Row> rows;  // one for each of its misses
  };
  std::vector<View> views;
  std::vector<Waiting> waiting;

  // Adds what these requests lack; those that ended meanwhile are left out.
  void collect(const std::vector<MissTag>& tags, int64_t mono_ns);
  // rows[v], meta[v]: a row for each key of view v. Puts them into the caches and resumes the requests;
  // returns those that must be asked for again.
  std::vector<MissTag> finish(const std::vector<const uint64_t*>& rows,
                              const std::vector<const RowMeta*>& meta, uint64_t stamp, int64_t mono_ns,
                              uint32_t owner, ServedModel::Scratch& scratch) const;

 private:
  View& view_of(const PlanView& view, uint32_t row_words, uint32_t* index);
};

}  // namespace penstock
