// The load generator: its parsers on mutated and cut replies, and a run against a server that echoes in
// random pieces and drops connections. Nothing may crash or read out of bounds; every request has one end.
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "load/load.h"
#include "load/replies.h"
#include "wire/reply.h"

using namespace penstock;
using namespace penstock::load;

namespace {

uint64_t state = 0x9e3779b97f4a7c15u;
uint64_t random_below(uint64_t n) {
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return state % n;
}

// A copy whose end the sanitizer guards.
struct Exact {
  explicit Exact(std::string_view text) : size(text.size()), bytes(std::make_unique<uint8_t[]>(size)) {
    if (size != 0) std::memcpy(bytes.get(), text.data(), size);
  }
  std::span<const uint8_t> span() const { return {bytes.get(), size}; }
  size_t size;
  std::unique_ptr<uint8_t[]> bytes;
};

std::string rpc_reply(uint32_t msgid) {
  wire::Writer out(1 << 20);
  const double scores[] = {0.25, 0.5};
  const uint64_t ids[] = {1, 2};
  switch (random_below(4)) {
    case 0:
      CHECK(wire::encode_goaway(out, 1000));
      break;
    case 1:
      CHECK(wire::encode_error(out, msgid, Status{Code::kResourceExhausted, "full"}, true, 7));
      break;
    default: {
      wire::ScoresReply reply;
      reply.scores = scores;
      reply.n_rows = 2;
      reply.version = "3";
      reply.request_ids = ids;
      reply.as_bin_f32 = random_below(2) == 0;
      CHECK(wire::encode_scores(out, msgid, reply));
    }
  }
  return {reinterpret_cast<const char*>(out.data()), out.size()};
}

std::string http_reply() {
  static const char* kReplies[] = {
      "HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n\x00\x00\x80\x3e\x00\x00\x00\x3f",
      "HTTP/1.1 503 Busy\r\ncontent-length:4\r\nConnection: close\r\n\r\nbusy",
      "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No\r\n\r\n",
      "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;x=y\r\n[0.25\r\nA\r\n, 0.5] \"\\\"\r\n0\r\nT: "
      "v\r\n\r\n",
  };
  const size_t i = random_below(4);
  return i == 0 ? std::string(kReplies[0], 46)  // it holds zeros
                : kReplies[i];
}

std::string mutated(std::string text) {
  for (uint64_t n = random_below(4); n > 0; --n) {
    const size_t at = random_below(text.size());
    switch (random_below(3)) {
      case 0:
        text[at] = static_cast<char>(random_below(256));
        break;
      case 1:
        text.erase(at, 1 + random_below(4));
        break;
      default:
        text.insert(at, 1, static_cast<char>(random_below(256)));
    }
    if (text.empty()) text = "x";
  }
  return text;
}

const double kExpected[] = {0.25, 0.5};

Judge judge(double* worst) {
  Judge made;
  made.expected = kExpected;
  made.tolerance = 1e-6;
  made.max_error = worst;
  return made;
}

void parsers_take_anything() {
  for (int round = 0; round < 30'000; ++round) {
    double worst = 0;
    std::string_view code;
    {
      const Exact bytes(mutated(rpc_reply(7)));
      RpcReplies replies;
      Reply reply;
      if (replies.next(bytes.span(), &reply) == Found::kReply) {
        Judge one = judge(&worst);
        (void)judge_rpc(reply, &one, &code);
      }
    }
    const Exact bytes(mutated(http_reply()));
    std::vector<uint8_t> scratch;
    Reply reply;
    if (next_http(bytes.span(), &scratch, &reply) == Found::kReply) {
      CHECK(reply.bytes <= bytes.size);
      for (const BodyFormat format : {BodyFormat::kFloat32, BodyFormat::kFloat64, BodyFormat::kFloat32Tail,
                                      BodyFormat::kJson, BodyFormat::kMsgpack}) {
        const Exact body({reinterpret_cast<const char*>(reply.body.data()), reply.body.size()});
        Judge one = judge(&worst);
        (void)judge_body(body.span(), format, round % 2 ? "x" : "", &one);
      }
    }
  }
}

// However a stream is cut, the same replies are found in it.
void cuts_change_nothing() {
  for (int round = 0; round < 2'000; ++round) {
    const bool http = round % 2 == 0;
    std::string text;
    for (int i = 0; i < 6; ++i) text += http ? http_reply() : rpc_reply(static_cast<uint32_t>(i));
    const auto read = [&](bool cut) {
      std::vector<size_t> found;
      RpcReplies replies;
      std::vector<uint8_t> scratch;
      size_t begin = 0, end = cut ? 0 : text.size();
      while (begin < text.size()) {
        Reply reply;
        const Exact seen(std::string_view(text).substr(begin, end - begin));
        const Found what =
            http ? next_http(seen.span(), &scratch, &reply) : replies.next(seen.span(), &reply);
        CHECK(what != Found::kBroken);
        if (what == Found::kNeedMore) {
          CHECK(end < text.size());
          end = std::min(text.size(), end + 1 + random_below(40));
          continue;
        }
        begin += reply.bytes;
        found.push_back(begin);
      }
      return found;
    };
    CHECK(read(true) == read(false));
  }
}

// Echoes what it reads, in pieces, and drops a connection now and then. One thread; ends when `stop` is set.
class EchoServer {
 public:
  explicit EchoServer(bool drops) : drops_(drops) {
    path_ = "/tmp/penstock-load-" + std::to_string(getpid()) + (drops ? "-drops" : "");
    unlink(path_.c_str());
    listener_ = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0);
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::memcpy(address.sun_path, path_.c_str(), path_.size() + 1);
    CHECK(bind(listener_, reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0);
    CHECK(listen(listener_, 16) == 0);
    thread_ = std::thread([this] { serve(); });
  }
  ~EchoServer() {
    stop_.store(true, std::memory_order_relaxed);  // read by serve()
    thread_.join();
    close(listener_);
    unlink(path_.c_str());
  }
  std::string address() const { return "unix://" + path_; }

 private:
  struct Peer {
    int fd;
    std::string pending;
  };

  void serve() {
    std::vector<Peer> peers;
    char buffer[3000];
    uint64_t turn = 0;
    while (!stop_.load(std::memory_order_relaxed)) {  // set by the destructor
      std::vector<pollfd> waits{{listener_, POLLIN, 0}};
      for (const Peer& peer : peers) {
        waits.push_back({peer.fd, static_cast<short>(POLLIN | (peer.pending.empty() ? 0 : POLLOUT)), 0});
      }
      poll(waits.data(), waits.size(), 5);
      const int fd = accept4(listener_, nullptr, nullptr, SOCK_NONBLOCK);
      if (fd >= 0) peers.push_back({fd, {}});
      for (size_t i = 0; i < peers.size();) {
        Peer& peer = peers[i];
        const ssize_t n = recv(peer.fd, buffer, 1 + turn % sizeof(buffer), 0);
        if (n > 0) peer.pending.append(buffer, static_cast<size_t>(n));
        const size_t size = std::min<size_t>(peer.pending.size(), 1 + ++turn * 7919 % 2000);
        const ssize_t sent = size == 0 ? 0 : send(peer.fd, peer.pending.data(), size, MSG_NOSIGNAL);
        if (sent > 0) peer.pending.erase(0, static_cast<size_t>(sent));
        if (n == 0 || (drops_ && turn % 301 == 0)) {
          close(peer.fd);
          peers.erase(peers.begin() + static_cast<ptrdiff_t>(i));
        } else {
          ++i;
        }
      }
    }
    for (const Peer& peer : peers) close(peer.fd);
  }

  const bool drops_;
  std::string path_;
  int listener_ = -1;
  std::atomic<bool> stop_{false};
  std::thread thread_;
};

void every_request_has_one_end(bool drops, double rate) {
  EchoServer server(drops);
  std::vector<uint8_t> bytes;
  std::vector<uint64_t> offsets{0};
  for (int i = 0; i < 64; ++i) {
    for (uint64_t n = 1 + random_below(3000); n > 0; --n)
      bytes.push_back(static_cast<uint8_t>(random_below(256)));
    offsets.push_back(bytes.size());
  }
  Requests requests;
  requests.bytes = bytes;
  requests.offsets = offsets;
  Options options;
  options.address = server.address();
  options.protocol = Protocol::kFixed;
  options.connections = 5;
  options.depth = 8;
  options.rate = rate;
  options.poisson = true;
  options.warmup_s = 0.05;
  options.duration_s = 0.4;
  options.drain_s = 0.3;
  options.reconnect_s = 0.01;
  auto report = std::make_unique<Report>();
  const Status status = run(options, requests, [](const Progress&) { return true; }, report.get());
  // Under `drops` a connection may be lost before the first request, which is an error of its own.
  if (drops && status.code == Code::kUnavailable) return;
  CHECK(status.is_ok());
  const uint64_t ok = report->outcomes[0].latency.count();
  CHECK(ok > 0);
  CHECK(report->outcomes[static_cast<size_t>(Outcome::kWrong)].latency.count() == 0);
  CHECK(report->due == report->sent + report->unsent);
  CHECK(report->sent == ok + report->unanswered + report->transport_errors);
  CHECK(drops ? report->reconnects > 0 : report->broken_connections == 0);
}

}  // namespace

int main() {
  parsers_take_anything();
  cuts_change_nothing();
  for (const bool drops : {false, true}) {
    for (const double rate : {0.0, 3000.0}) every_request_has_one_end(drops, rate);
  }
  return 0;
}
