// The channel to a child process, with threads in the child's place: scores, the text of a failure, a child
// that dies before, during and after a run, that hangs, that answers another call or half a packet; a close
// during a run; and many runs while children come and go.
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "../check.h"
#include "engine/child_channel.h"

using namespace penstock;

namespace {

constexpr size_t kFeatures = 3;
constexpr int64_t kSecond = 1'000'000'000;

std::shared_ptr<ChildChannel> make(const ScoreRule& rule, int64_t timeout_ns = 60 * kSecond) {
  std::shared_ptr<ChildChannel> channel;
  CHECK(ChildChannel::create(kFeatures, rule, timeout_ns, &channel).is_ok());
  return channel;
}

// The child's end: a mapping of its own and one socket.
class Child {
 public:
  Child(ChildChannel& channel, size_t width) : width_(width) {
    bytes_ = ChildChannel::block_bytes(kFeatures, width);
    block_ = static_cast<uint8_t*>(
        mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, channel.memory_fd(), 0));
    CHECK(block_ != MAP_FAILED);
    int ends[2];
    CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) == 0);
    socket_ = ends[1];
    channel.attach(ends[0], -1, kSecond);
  }
  ~Child() {
    hang_up();
    munmap(block_, bytes_);
  }
  void hang_up() {
    if (socket_ >= 0) close(socket_);
    socket_ = -1;
  }
  // False: the channel let go of this child.
  bool next(ChildChannel::Call* call) { return recv(socket_, call, sizeof *call, 0) == sizeof *call; }
  void score(const ChildChannel::Call& call) {
    const auto* rows = reinterpret_cast<const float*>(block_);
    auto* scores = reinterpret_cast<double*>(block_ + ChildChannel::scores_offset(kFeatures));
    for (uint32_t i = 0; i < call.rows; ++i) {
      for (size_t k = 0; k < width_; ++k)
        scores[i * width_ + k] = rows[i * kFeatures] + rows[i * kFeatures + 1] + static_cast<double>(k);
    }
    reply({call.sequence, 0, 0});
  }
  void fail(const ChildChannel::Call& call, const std::string& text, uint32_t claimed) {
    std::memcpy(block_ + ChildChannel::text_offset(kFeatures, width_), text.data(), text.size());
    reply({call.sequence, 1, claimed});
  }
  void reply(const ChildChannel::Reply& reply) { (void)!send(socket_, &reply, sizeof reply, MSG_NOSIGNAL); }
  int socket() const { return socket_; }

 private:
  const size_t width_;
  size_t bytes_;
  uint8_t* block_;
  int socket_ = -1;
};

Status run(ChildChannel& channel, float first, size_t n, std::vector<double>* scores) {
  std::vector<float> rows(n * kFeatures, 1.0f);
  for (size_t i = 0; i < n; ++i) rows[i * kFeatures] = first + static_cast<float>(i);
  scores->assign(n * channel.rule().n_outputs(), -1.0);
  return channel.run(rows.data(), n, scores->data());
}

bool alarmed(ChildChannel& channel) {
  uint64_t count = 0;
  return read(channel.alarm_fd(), &count, sizeof count) == sizeof count;
}

void scores_of_all_columns_or_one() {
  for (const int column : {-1, 1}) {
    const auto channel = make({2, column, false});
    Child child(*channel, 2);
    std::thread served([&] {
      ChildChannel::Call call;
      for (int i = 0; i < 64 && child.next(&call); ++i) child.score(call);
    });
    std::vector<double> scores;
    for (size_t n = 1; n <= 64; ++n) {
      CHECK(run(*channel, static_cast<float>(n), n, &scores).is_ok());
      for (size_t i = 0; i < n; ++i) {
        const double sum = static_cast<double>(n + i) + 1;
        if (column < 0) {
          CHECK(scores[2 * i] == sum);
          CHECK(scores[2 * i + 1] == sum + 1);
        } else {
          CHECK(scores[i] == sum + 1);
        }
      }
    }
    served.join();
    CHECK(!alarmed(*channel));
  }
}

void what_is_no_probability_is_no_score() {
  const ScoreRule rule{1, -1, true};
  const double raw[] = {0.5, -1e-7, 1 + 1e-7, 1.1, -0.1, INFINITY, -INFINITY, NAN};
  double scores[8];
  rule.apply(raw, 8, scores);
  CHECK(scores[0] == 0.5 && scores[1] == 0.0 && scores[2] == 1.0);
  for (int i = 3; i < 8; ++i) CHECK(std::isnan(scores[i]));
  ScoreRule{1, -1, false}.apply(raw, 8, scores);
  CHECK(scores[3] == 1.1 && scores[4] == -0.1);
  for (int i = 5; i < 8; ++i) CHECK(std::isnan(scores[i]));
}

void a_failure_has_its_text() {
  const auto channel = make({});
  Child child(*channel, 1);
  std::thread served([&] {
    ChildChannel::Call call;
    CHECK(child.next(&call));
    child.fail(call, "ValueError:\n\xff", 13);
    CHECK(child.next(&call));
    child.fail(call, std::string(ChildChannel::kTextBytes, 'x'), UINT32_MAX);
    CHECK(child.next(&call));
    child.score(call);
  });
  std::vector<double> scores;
  Status status = run(*channel, 0, 1, &scores);
  CHECK(status.code == Code::kInternal);
  CHECK(status.message == "the model raised ValueError: ?");
  status = run(*channel, 0, 1, &scores);
  CHECK(status.message == "the model raised " + std::string(ChildChannel::kTextBytes, 'x'));
  CHECK(run(*channel, 1, 1, &scores).is_ok());
  CHECK(scores[0] == 2.0);
  served.join();
  CHECK(!alarmed(*channel));
}

// `act` is what the child does with the call; then the channel has no child, and the next one serves.
void lost_child(const char* why, int64_t timeout_ns,
                const std::function<void(Child&, const ChildChannel::Call&)>& act) {
  const auto channel = make({}, timeout_ns);
  std::vector<double> scores;
  {
    Child child(*channel, 1);
    std::thread served([&] {
      ChildChannel::Call call;
      CHECK(child.next(&call));
      act(child, call);
    });
    const Status status = run(*channel, 0, 4, &scores);
    CHECK(status.code == Code::kUnavailable);
    CHECK(status.message.find(why) != std::string::npos);
    CHECK(channel->reason().find(why) != std::string::npos);
    CHECK(alarmed(*channel));
    CHECK(channel->retry_after_ms() >= 1 && channel->retry_after_ms() <= 1000);
    CHECK(run(*channel, 0, 4, &scores).code == Code::kUnavailable);
    CHECK(!alarmed(*channel));
    served.join();
  }
  Child next(*channel, 1);
  std::thread served([&] {
    ChildChannel::Call call;
    CHECK(next.next(&call));
    next.score(call);
  });
  CHECK(run(*channel, 7, 4, &scores).is_ok());
  CHECK(scores[3] == 11.0);
  served.join();
}

void a_dead_child_is_told_at_the_next_run() {
  const auto channel = make({});
  std::vector<double> scores;
  CHECK(run(*channel, 0, 1, &scores).code == Code::kUnavailable);  // none yet
  Child child(*channel, 1);
  child.hang_up();
  CHECK(run(*channel, 0, 1, &scores).code == Code::kUnavailable);
  CHECK(alarmed(*channel));
}

void a_reply_counts_though_its_sender_died_after_it() {
  const auto channel = make({});
  Child child(*channel, 1);
  std::thread served([&] {
    ChildChannel::Call call;
    CHECK(child.next(&call));
    child.score(call);
    child.hang_up();
  });
  std::vector<double> scores;
  CHECK(run(*channel, 2, 1, &scores).is_ok());
  CHECK(scores[0] == 3.0);
  served.join();
}

void close_ends_a_run() {
  const auto channel = make({});
  Child child(*channel, 1);
  std::thread closing([&] {
    ChildChannel::Call call;
    CHECK(child.next(&call));
    channel->close();
  });
  std::vector<double> scores;
  CHECK(run(*channel, 0, 1, &scores).code == Code::kUnavailable);
  closing.join();
  CHECK(run(*channel, 0, 1, &scores).code == Code::kUnavailable);
}

// Every run ends with its own scores or UNAVAILABLE, while children come and go under it.
void runs_while_children_come_and_go() {
  const auto channel = make({});
  std::atomic<bool> done{false};
  std::atomic<int> ok{0};
  std::thread runner([&] {
    std::vector<double> scores;
    for (int i = 0; !done; ++i) {
      const auto n = static_cast<size_t>(1 + i % 64);
      const Status status = run(*channel, static_cast<float>(i % 1000), n, &scores);
      if (status.is_ok()) {
        for (size_t r = 0; r < n; ++r)
          CHECK(scores[r] == static_cast<double>(i % 1000) + static_cast<double>(r) + 1);
        ++ok;
      } else {
        CHECK(status.code == Code::kUnavailable);
        (void)channel->retry_after_ms();
      }
    }
  });
  for (int life = 0; life < 300; ++life) {
    Child child(*channel, 1);
    ChildChannel::Call call;
    for (int i = 0; i < life % 7 && child.next(&call); ++i) child.score(call);
    child.hang_up();  // perhaps in a run
    channel->detach("it is gone");
    channel->read_alarm();
  }
  done = true;
  runner.join();
  CHECK(ok > 0);
}

}  // namespace

int main() {
  scores_of_all_columns_or_one();
  what_is_no_probability_is_no_score();
  a_failure_has_its_text();
  a_dead_child_is_told_at_the_next_run();
  a_reply_counts_though_its_sender_died_after_it();
  lost_child("died", 60 * kSecond, [](Child& child, const auto&) { child.hang_up(); });
  lost_child("no answer within 50 ms", kSecond / 20, [](Child&, const auto&) {});
  lost_child("another call", 60 * kSecond,
             [](Child& child, const auto& call) { child.reply({call.sequence + 1, 0, 0}); });
  lost_child("protocol", 60 * kSecond,
             [](Child& child, const auto&) { (void)!send(child.socket(), "x", 1, MSG_NOSIGNAL); });
  close_ends_a_run();
  runs_while_children_come_and_go();
  return 0;
}
