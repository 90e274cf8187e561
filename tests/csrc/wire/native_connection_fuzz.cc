// Mutated messages, spliced, cut and repeated, through Session and Connection into a served model: none may
// crash, hang, read out of bounds or stay unanswered. The first argument is the number of bytes to push.
#include <cstdlib>
#include <string_view>
#include <vector>

#include "check.h"
#include "fuzz_peer.h"
#include "random.h"

using namespace penstock;
using namespace penstock::wire;

namespace {

void write_options(Writer& out) {
  const uint64_t which = random_below(64);
  uint32_t count = 0;
  for (int bit = 0; bit < 6; ++bit) count += which >> bit & 1;
  out.map(count);
  if (which & 1) {
    out.str("deadline_ms");
    out.f64(static_cast<double>(random_below(100)) - 1);
  }
  if (which & 2) {
    out.str("now");
    random_below(2) ? out.integer(1'772'323'200'000'000) : out.ext(-1, "\x69\xa3\x00\x00", 4);
  }
  if (which & 4) {
    out.str("priority");
    out.str(random_below(2) ? "low" : "high");
  }
  if (which & 8) {
    out.str("timings");
    out.boolean(true);
  }
  if (which & 16) {
    out.str("no_cache");
    out.boolean(true);
  }
  if (which & 32) {
    out.str("request_id");
    out.uint(random_below(UINT64_MAX));
  }
}

void write_message(Writer& out) {
  static uint32_t msgid = 0;
  const uint64_t kind = random_below(16);
  if (kind == 0) {  // cancel
    out.array(3);
    out.uint(2);
    out.str("cancel");
    out.array(1);
    out.uint(msgid - random_below(4));
    return;
  }
  out.array(4);
  out.uint(0);
  out.uint(++msgid);
  if (kind <= 2) {
    out.str(kind == 1 ? "auth" : "stats");
    out.array(kind == 1 ? 1 : 0);
    if (kind == 1) out.str("a token");
    return;
  }
  const auto rows = static_cast<uint32_t>(1 + random_below(random_below(8) ? 4 : 100));
  if (kind <= 6) {
    const std::vector<float> data(size_t{3} * rows, 1.5f);
    out.str("predict_vectors");
    out.array(4);
    out.str("m");
    out.bin(data.data(), data.size() * sizeof(float));
    out.uint(rows);
  } else {
    out.str("predict");
    out.array(4);
    out.str("m");
    out.map(1);
    out.str("user");
    out.array(rows);
    for (uint32_t i = 0; i < rows; ++i) out.integer(static_cast<int64_t>(random_below(200)));
    out.nil();
  }
  write_options(out);
}

void mutate(std::vector<uint8_t>& bytes) {
  static std::vector<uint8_t> earlier{0xc0};
  constexpr uint8_t kHeads[] = {0xc0, 0xc1, 0xc4, 0xc6, 0xc9, 0xcf, 0xd3, 0xd9, 0xdb, 0xdd, 0xdf, 0x90, 0x9f};
  for (uint64_t i = random_below(4); i > 0; --i) {
    uint8_t& byte = bytes[random_below(bytes.size())];
    switch (random_below(3)) {
      case 0:
        byte = static_cast<uint8_t>(random_below(256));
        break;
      case 1:
        byte ^= static_cast<uint8_t>(1u << random_below(8));
        break;
      default:
        byte = kHeads[random_below(sizeof kHeads)];
    }
  }
  if (random_below(16) == 0) {  // an earlier one's bytes in the middle
    const auto from = static_cast<std::ptrdiff_t>(random_below(earlier.size()));
    bytes.insert(bytes.begin() + static_cast<std::ptrdiff_t>(random_below(bytes.size())),
                 earlier.begin() + from, earlier.end());
  }
  if (random_below(12) == 0) bytes.resize(1 + random_below(bytes.size()));
  if (random_below(8) == 0) earlier = bytes;
}

}  // namespace

int main(int argc, char** argv) {
  const uint64_t wanted = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 1'000'000;
  FuzzPeer peer;
  uint64_t pushed = 0, connections = 0;
  while (pushed < wanted) {
    Writer frame(1 << 14);
    for (uint64_t burst = 1 + random_below(5); burst > 0; --burst) write_message(frame);
    // The exact size on the heap, so that a sanitizer sees a read of one byte more.
    std::vector<uint8_t> bytes(frame.data(), frame.data() + frame.size());
    if (random_below(4) != 0) mutate(bytes);
    peer.feed(bytes.data(), bytes.size(), 1 + random_below(random_below(4) ? 4096 : 64));
    pushed += bytes.size();
    if (peer.closed() || random_below(50) == 0) {
      peer.settle();
      peer.connect(random_below(4) != 0);
      ++connections;
    }
  }
  peer.settle();
  std::printf("%llu bytes, %llu connections, %llu ok (%llu scored), %llu errors, %llu calls\n",
              static_cast<unsigned long long>(pushed), static_cast<unsigned long long>(connections),
              static_cast<unsigned long long>(peer.ok), static_cast<unsigned long long>(peer.scored),
              static_cast<unsigned long long>(peer.errors), static_cast<unsigned long long>(peer.calls));
  // The mutations must have reached every way out.
  CHECK(peer.scored > wanted / 20'000 && peer.errors > wanted / 20'000 && peer.calls > wanted / 20'000);
  CHECK(connections > wanted / 50'000);
  return 0;
}
