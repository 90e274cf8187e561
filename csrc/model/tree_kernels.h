// The kernels, one of each kind per instruction set; tree_ensemble.cc chooses. All of a run's leaves come out
// as bytes, leaves[tree * kLanes + row], and are the same whichever kernel found them. Ranks lie column by
// column, ranks[column * kLanes + row]. Any thread may run a kernel on memory of its own.
#pragma once

#include <cstddef>
#include <cstdint>

#include "model/tree_plan.h"

namespace penstock {

// Ranks of n <= kLanes rows in the run's numeric columns but twins, 0 for a missing value.
using RankKernel = void (*)(const TreePlan& plan, const TreeRun& run, const float* rows, size_t n,
                            size_t stride, int8_t* ranks);
// Leaves of the first n <= kLanes rows, by pieces: the work of a whole register whatever n is.
using PieceKernel = void (*)(const TreeRun& run, const int8_t* ranks, size_t n, uint8_t* leaves);
// The leaf of row `row`, by checkpoints; masks: kCheckpointTrees * 8 bytes, aligned to 64.
using CheckpointKernel = void (*)(const TreeRun& run, const int8_t* ranks, size_t row, void* masks,
                                  uint8_t* leaves);

void rank_portable(const TreePlan& plan, const TreeRun& run, const float* rows, size_t n, size_t stride,
                   int8_t* ranks);
void rank_avx2(const TreePlan& plan, const TreeRun& run, const float* rows, size_t n, size_t stride,
               int8_t* ranks);
void rank_avx512(const TreePlan& plan, const TreeRun& run, const float* rows, size_t n, size_t stride,
                 int8_t* ranks);

#if defined(__SSE4_1__)
void piece_leaves_sse4(const TreeRun& run, const int8_t* ranks, size_t n, uint8_t* leaves);
#endif
void piece_leaves_avx2(const TreeRun& run, const int8_t* ranks, size_t n, uint8_t* leaves);
void piece_leaves_avx512(const TreeRun& run, const int8_t* ranks, size_t n, uint8_t* leaves);

void checkpoint_leaves_portable(const TreeRun& run, const int8_t* ranks, size_t row, void* masks,
                                uint8_t* leaves);
void checkpoint_leaves_avx2(const TreeRun& run, const int8_t* ranks, size_t row, void* masks,
                            uint8_t* leaves);
void checkpoint_leaves_avx512(const TreeRun& run, const int8_t* ranks, size_t row, void* masks,
                              uint8_t* leaves);

// Leaves of n <= kLanes rows, several walks at a time; for a run with nodes.
void walk_leaves(const TreeRun& run, const int8_t* ranks, size_t n, uint8_t* leaves);

// Adds to sums[r], r < n, the trees' values in their order: values[value_begin[t] + leaf].
void add_leaves(const double* values, const uint32_t* value_begin, const uint8_t* leaves, size_t n_trees,
                size_t n, double* sums);
// The same from TreeRun::halves.
void add_leaves_avx512(const TreeRun& run, const uint8_t* leaves, size_t n, double* sums);

}  // namespace penstock
