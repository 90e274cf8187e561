// A compiled feature expression program: a register machine over blocks of 64 rows.
//
// The bytes come from penstock.features.program; penstock.features.oracle is the meaning of each
// operation. parse() checks every index, kind and length, so run() trusts them: corrupt bytes are an error.
// A program is immutable; any number of threads may run it, each with its own Scratch. run() never allocates.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "features/program_code.h"

namespace penstock {

class FeatureProgram {
 public:
  struct Scratch {
    std::vector<Block> registers;
    std::vector<const Block*> refs;
  };

  static Status parse(const uint8_t* data, size_t size, std::shared_ptr<const FeatureProgram>* out);

  const std::vector<Field>& inputs() const { return inputs_; }
  const std::vector<Field>& outputs() const { return outputs_; }
  Scratch make_scratch() const;

  // Whether the input "now" decides the outputs through calendar fields of itself, or of it and constants,
  // alone (hour(now), weekday(now + 2h), ...), so that times with equal now_buckets() give equal outputs.
  // True when it is not read.
  bool now_is_bucketed() const { return now_bucketed_; }
  size_t n_now_buckets() const { return now_buckets_.size(); }
  // The fields at now_us; INT64_MIN for null.
  void now_buckets(int64_t now_us, Scratch& scratch, int64_t* buckets) const;

  // inputs: inputs().size() blocks; outputs: outputs().size() blocks, not aliasing the inputs; n <= 64.
  // The value of a null output is zero.
  void run(const Block* inputs, size_t n, Block* outputs, Scratch& scratch) const;

 private:
  struct TableData {
    uint8_t kind;
    std::vector<double> f64;
    std::vector<int64_t> i64;
  };
  void find_now_uses();

  std::vector<Field> inputs_;
  std::vector<Field> outputs_;
  std::vector<uint32_t> output_registers_;
  std::vector<Block> constants_;
  std::vector<TableData> table_data_;
  std::vector<ProgramTable> tables_;
  std::vector<ProgramInstruction> code_;
  bool now_bucketed_ = true;
  uint32_t now_input_ = 0;
  std::vector<uint32_t> now_steps_;    // of code_: those of `now` and constants alone
  std::vector<uint32_t> now_buckets_;  // of code_: calendar fields, among now_steps_
};

}  // namespace penstock
