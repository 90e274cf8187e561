// A feature program's instructions as the kernels take them, and the kernels, one per instruction set.
//
// Registers are blocks; a kernel runs `count` instructions over n <= 64 rows, reading registers[operand] and
// writing results[i] for instruction i. The caller has put each result's address among `registers`. Any
// thread may run a kernel on memory of its own.
#pragma once

#include <cstddef>
#include <cstdint>

#include "features/row.h"

namespace penstock {

struct ProgramInstruction {
  uint16_t op;        // FeatureOp
  uint16_t operands;  // how many of a, b, c are registers; a table's number follows them
  uint32_t a, b, c;
};

// Values ascending; of a rank table, f64 with i64 the cumulative counts.
struct ProgramTable {
  const double* f64;
  const int64_t* i64;
  size_t size;
};

using ProgramKernel = void (*)(const ProgramInstruction* code, size_t count, const ProgramTable* tables,
                               size_t n, const Block** registers, Block* results);

void run_program_portable(const ProgramInstruction* code, size_t count, const ProgramTable* tables, size_t n,
                          const Block** registers, Block* results);
void run_program_avx2(const ProgramInstruction* code, size_t count, const ProgramTable* tables, size_t n,
                      const Block** registers, Block* results);
void run_program_avx512(const ProgramInstruction* code, size_t count, const ProgramTable* tables, size_t n,
                        const Block** registers, Block* results);

}  // namespace penstock
