// The target of libFuzzer: any bytes as one peer's stream, into Session, Connection and a served model. The
// first byte tells in what pieces they arrive and whether the peer must show a token.
#include "fuzz_peer.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static auto* peer = new penstock::FuzzPeer;  // for the life of the process
  if (size == 0) return 0;
  peer->connect((data[0] & 1) == 0);
  peer->feed(data + 1, size - 1, (data[0] >> 1) == 0 ? 1 : size_t{1} << (data[0] >> 1) % 13);
  peer->settle();
  return 0;
}
