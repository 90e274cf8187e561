// What the two halves of EventTable share: event_table.cc builds and changes it, event_table_read.cc reads
// rows.
#pragma once

#include <vector>

#include "features/event_table.h"

namespace penstock {

struct EventTable::Found {
  EventSlice events;
  const ValueSlice* values = nullptr;
  KnownPoints points;
  const History* history = nullptr;
  uint32_t key = kNoKey;
  std::vector<ValueSlice> base_values;
};

struct EventTable::Scratch {
  Found found;
  FeatureProgram::Scratch program;
  std::vector<Block> in, out;
  std::vector<Segment> segments;
  std::vector<RowOrder> order, spare;
  std::vector<uint8_t> registers;
  ValueCounter counter;
  std::vector<Word> totals;   // of the aggregates: kMaxFoldWords each
  std::vector<Word> results;  // of the aggregates
  std::vector<uint8_t> results_valid;

  explicit Scratch(const FeatureProgram* used) {
    if (used == nullptr) return;
    program = used->make_scratch();
    in.resize(used->inputs().size());
    out.resize(used->outputs().size());
  }
};

// Runs a program over n <= 64 rows: read(column, row(i), word) gives its inputs, scratch->out gets its
// outputs.
template <class Rows, class Read>
void EventTable::evaluate(const FeatureProgram& program, const std::vector<uint32_t>& inputs, size_t n,
                          const Rows& row, const Read& read, Scratch* scratch) {
  for (size_t c = 0; c < inputs.size(); ++c) {
    Block& block = scratch->in[c];
    block.valid = 0;
    for (size_t r = 0; r < n; ++r) {
      Word word;
      block.valid |= uint64_t{read(inputs[c], row(r), &word)} << r;
      block.i64[r] = word.i;
    }
  }
  program.run(scratch->in.data(), n, scratch->out.data(), scratch->program);
}

}  // namespace penstock
