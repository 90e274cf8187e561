// The shipped slot protocol under Relacy's model of C++11 memory orders: two writes against two reads.
#define PENSTOCK_RELACY 1
#include "cache/slot_protocol.h"

namespace {

namespace slot = penstock::slot;
namespace sync = penstock::sync;

struct SlotTest : rl::test_suite<SlotTest, 2> {
  sync::Word word;
  sync::Word data[2];

  void before() {
    sync::store(word, slot::make_word(7, 2), sync::kRelaxed);
    for (auto& w : data) sync::store(w, 2, sync::kRelaxed);
  }

  void thread(unsigned index) {
    if (index == 0) {
      for (uint64_t version : {4, 6}) {
        const uint64_t values[2] = {version, version};
        slot::write_begin(word);
        slot::copy_in(data, values, 2);
        slot::publish(word, slot::make_word(7, version));
      }
      return;
    }
    for (int i = 0; i < 2; ++i) {
      const uint64_t seen = slot::read_begin(word);
      if (slot::is_being_written(seen)) continue;
      uint64_t out[2];
      slot::copy_out(data, out, 2);
      if (!slot::read_confirm(word, seen)) continue;
      RL_ASSERT(out[0] == (seen & slot::kVersionMask));
      RL_ASSERT(out[1] == out[0]);
    }
  }
};

}  // namespace

int main() {
  rl::test_params params;
  params.iteration_count = 20000;
  return rl::simulate<SlotTest>(params) ? 0 : 1;
}
