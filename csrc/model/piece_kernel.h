// The piece kernel for registers without mask registers (SSE4, AVX2), included by their sources. Unit is one
// register's operations; kRegisters of them go through a tree together.
#pragma once

#include "model/tree_kernels.h"

namespace penstock {
namespace {  // each including source keeps its own code

template <class Unit, size_t kRegisters>
void piece_leaves(const TreeRun& run, const int8_t* ranks, uint8_t* leaves) {
  using Register = typename Unit::Register;
  const TreePiece* piece = run.pieces.data();
  for (size_t t = 0; t < run.n_trees; ++t) {
    const TreePiece* end = run.pieces.data() + run.piece_begin[t + 1];
    Register state[kRegisters];
    for (Register& s : state) s = Unit::zero();
    for (; piece != end; ++piece) {
      const typename Unit::Small small(*piece);
      const Register start = small.template spread<kPieceSplits>();
      const Register table = Unit::table(piece->next);
      Register threshold[kPieceSplits];
      threshold[0] = small.template spread<0>();
      threshold[1] = small.template spread<1>();
      threshold[2] = small.template spread<2>();
      threshold[3] = small.template spread<3>();
      for (size_t i = 0; i < kRegisters; ++i) {
        const int8_t* of = ranks + i * sizeof(Register);
        const auto fails = [&](size_t split) {  // -1 where the row goes right
          return Unit::greater(Unit::load(of + 8 * size_t{piece->column[split]}), threshold[split]);
        };
        Register code = Unit::subtract(Unit::zero(), fails(3));
        code = Unit::subtract(Unit::add(code, code), fails(2));
        code = Unit::subtract(Unit::add(code, code), fails(1));
        code = Unit::subtract(Unit::add(code, code), fails(0));
        state[i] = Unit::choose(state[i], Unit::look_up(table, code), Unit::equal(state[i], start));
      }
    }
    for (size_t i = 0; i < kRegisters; ++i) {
      Unit::store(leaves + t * kLanes + i * sizeof(Register), state[i]);
    }
  }
}

}  // namespace
}  // namespace penstock
