// The shipped slot protocol when a writer dies: it stops before any of its steps, a survivor that knows of
// its end (as waitpid knows) empties the slot if it is half-written and writes on, and a reader reads all the
// while. A read that is confirmed must be whole and be what the publisher of its version wrote.
#define PENSTOCK_RELACY 1
#include "cache/slot_protocol.h"

namespace {

namespace slot = penstock::slot;
namespace sync = penstock::sync;

constexpr uint64_t kTag = 7;

struct TakeoverTest : rl::test_suite<TakeoverTest, 3> {
  sync::Word word;
  sync::Word sequence;
  sync::Word data[2];
  sync::Word ended;  // the kernel's word that the writer is gone

  void before() {
    sync::store(word, slot::make_word(kTag, 2), sync::kRelaxed);
    sync::store(sequence, 2, sync::kRelaxed);
    sync::store(ended, 0, sync::kRelaxed);
    for (auto& w : data) sync::store(w, 2, sync::kRelaxed);
  }

  uint64_t next_version() {
    const uint64_t next = sync::load(sequence, sync::kRelaxed) + 2;
    sync::store(sequence, next, sync::kRelaxed);
    return next;
  }

  void die_in_a_put() {
    const unsigned steps = rl::rand(6);
    if (steps == 0) return;
    const uint64_t version = next_version();
    const uint64_t values[2] = {version, version};
    if (steps == 1) return;
    slot::write_begin(word);
    if (steps == 2) return;
    slot::copy_in(data, values, 1);
    if (steps == 3) return;
    slot::copy_in(data + 1, values + 1, 1);
    if (steps == 4) return;
    slot::publish(word, slot::make_word(kTag, version));
  }

  void thread(unsigned index) {
    if (index == 0) {
      die_in_a_put();
      sync::store(ended, 1, sync::kRelease);
      return;
    }
    if (index == 1) {
      while (sync::load(ended, sync::kAcquire) == 0) rl::yield(1, RL_INFO);
      if (slot::is_being_written(sync::load(word, sync::kRelaxed)))
        slot::publish(word, slot::make_word(0, next_version()));
      const uint64_t version = next_version();
      const uint64_t values[2] = {version, version};
      slot::write_begin(word);
      slot::copy_in(data, values, 2);
      slot::publish(word, slot::make_word(kTag, version));
      return;
    }
    for (int i = 0; i < 3; ++i) {
      const uint64_t seen = slot::read_begin(word);
      if (slot::tag_of(seen) == 0 || slot::is_being_written(seen)) continue;
      uint64_t out[2];
      slot::copy_out(data, out, 2);
      if (!slot::read_confirm(word, seen)) continue;
      RL_ASSERT(out[0] == (seen & slot::kVersionMask));
      RL_ASSERT(out[1] == out[0]);
    }
  }

  void after() {
    const uint64_t last = sync::load(word, sync::kRelaxed);
    RL_ASSERT(slot::tag_of(last) == kTag && !slot::is_being_written(last));
  }
};

}  // namespace

int main() {
  rl::test_params params;
  params.iteration_count = 20000;
  return rl::simulate<TakeoverTest>(params) ? 0 : 1;
}
