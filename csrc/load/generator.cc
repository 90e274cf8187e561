// The loop behind load.h: due times, sends, replies and the books over them.
#include <errno.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>

#include "load/connection.h"
#include "load/endpoint.h"
#include "load/load.h"
#include "load/replies.h"

namespace penstock::load {
namespace {

constexpr int64_t kSecond = 1'000'000'000;
constexpr int64_t kNever = INT64_MAX;
constexpr int64_t kWatchEvery = kSecond / 5;
constexpr int64_t kConnectTime = 10 * kSecond;
constexpr uint32_t kGreetingId = UINT32_MAX;  // no slot has it: slots end at 65534
constexpr int kEvents = 512;
constexpr size_t kRead = 16 << 10;
constexpr size_t kMaxOtherErrors = 16;

int64_t clock_ns() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return int64_t{now.tv_sec} * kSecond + now.tv_nsec;
}

double thread_cpu_s() {
  rusage used;
  getrusage(RUSAGE_THREAD, &used);
  return static_cast<double>(used.ru_utime.tv_sec + used.ru_stime.tv_sec) +
         static_cast<double>(used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6;
}

// When requests fall due, as offsets from the first.
class Schedule {
 public:
  Schedule(double rate, bool poisson, uint64_t seed)
      : period_ns_(1e9 / rate), poisson_(poisson), state_(seed) {}

  int64_t offset_ns() const { return static_cast<int64_t>(offset_ns_); }
  void advance() {
    ++n_;
    if (poisson_) {
      offset_ns_ -= std::log(1 - uniform()) * period_ns_;
    } else {
      offset_ns_ = static_cast<double>(n_) * period_ns_;
    }
  }

 private:
  double uniform() {  // splitmix64; [0, 1)
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return static_cast<double>((z ^ z >> 31) >> 11) * 0x1p-53;
  }

  const double period_ns_;
  const bool poisson_;
  uint64_t state_;
  uint64_t n_ = 0;
  double offset_ns_ = 0;
};

class Generator {
 public:
  Generator(const Options& options, const Requests& requests, const Watch& watch, Report* report)
      : options_(options),
        requests_(requests),
        watch_(watch),
        report_(*report),
        open_loop_(options.rate > 0),
        schedule_(open_loop_ ? options.rate : 1, options.poisson, options.seed),
        tick_ns_(static_cast<int64_t>(options.tick_us * 1e3)),
        good_ns_(static_cast<int64_t>(options.goodput_ms * 1e6)),
        reconnect_ns_(static_cast<int64_t>(options.reconnect_s * 1e9)) {}
  ~Generator();
  Generator(const Generator&) = delete;
  Generator& operator=(const Generator&) = delete;

  Status run();

 private:
  bool sending() const { return phase_ == Phase::kWarmup || phase_ == Phase::kWindow; }
  bool in_window(int64_t ns) const { return ns >= window_begin_ && ns < window_end_; }

  Status connect_all();
  void start(Connection& c);
  void established(Connection& c);
  void hang_up(Connection& c, bool broken, int64_t pause_ns);
  void reconnect_due();
  void set_interest(Connection& c, bool write);

  void send_due();
  Connection* pick();
  void append(Connection& c, int64_t due_ns);
  void refill(Connection& c);
  void flush(Connection& c);

  void on_event(const epoll_event& event);
  void on_readable(Connection& c);
  bool parse(Connection& c);
  Judge judge_of(uint32_t request);
  void complete(Connection& c, InFlight* one, Outcome outcome);

  int wait(int64_t until_ns);
  void change_phase();
  void tell();
  void settle();

  const Options& options_;
  const Requests& requests_;
  const Watch& watch_;
  Report& report_;
  const bool open_loop_;
  Schedule schedule_;
  const int64_t tick_ns_, good_ns_, reconnect_ns_;
  Endpoint endpoint_;
  std::deque<Connection> connections_;  // never moved: epoll holds pointers
  std::vector<Connection*> dirty_;
  std::vector<uint8_t> scratch_;
  epoll_event events_[kEvents];
  int epoll_ = -1;
  int old_slack_ = 0;
  bool fine_waits_ = true;  // the kernel has epoll_pwait2

  Phase phase_ = Phase::kConnect;
  int64_t now_ = 0;
  int64_t start_ = 0, window_begin_ = kNever, window_end_ = kNever, drain_end_ = kNever;
  int64_t next_watch_ = 0;
  int64_t next_release_ = 0;
  int64_t held_until_ = 0;  // when a due request last found every connection full
  bool full_ = false;
  size_t position_ = 0;  // in the order of sending
  size_t turn_ = 0;      // whose turn it is among the connections
  size_t down_ = 0;      // connections that are not up
  uint64_t total_in_flight_ = 0;
  uint64_t ok_ = 0, failed_ = 0;
  double cpu_begin_ = 0;
  Status fault_;
};

Generator::~Generator() {
  for (Connection& c : connections_) {
    if (c.fd >= 0) close(c.fd);
  }
  if (epoll_ >= 0) close(epoll_);
  if (old_slack_ > 0) prctl(PR_SET_TIMERSLACK, old_slack_);
}

// ---- connections

void Generator::start(Connection& c) {
  c.fd = endpoint_.connect();
  if (c.fd < 0) {
    if (phase_ == Phase::kConnect && errno != EAGAIN) {
      fault_ = {Code::kUnavailable, "cannot connect to " + options_.address + ": " + std::strerror(errno)};
    }
    c.connect_at_ns = now_ + std::max(reconnect_ns_, kSecond / 100);
    return;
  }
  c.state = Connection::State::kConnecting;
  epoll_event event{};
  event.events = EPOLLIN | EPOLLOUT;
  event.data.ptr = &c;
  c.want_write = true;
  epoll_ctl(epoll_, EPOLL_CTL_ADD, c.fd, &event);
}

void Generator::established(Connection& c) {
  c.state = Connection::State::kUp;
  --down_;
  if (!options_.greeting.empty()) {
    const auto room = c.output.room(options_.greeting.size());
    std::memcpy(room.data(), options_.greeting.data(), options_.greeting.size());
    c.output.filled(options_.greeting.size());
  }
  if (phase_ != Phase::kConnect) {
    ++report_.reconnects;
    if (!open_loop_) refill(c);
  }
  flush(c);
}

void Generator::hang_up(Connection& c, bool broken, int64_t pause_ns) {
  if (phase_ == Phase::kConnect && fault_.is_ok() && broken) {
    fault_ = {Code::kUnavailable, options_.address + " closed a connection before the first request"};
  }
  if (broken) ++report_.broken_connections;
  for (const InFlight& one : c.slots) {
    if (!one.waiting) continue;
    ++failed_;
    if (in_window(one.due_ns)) ++report_.transport_errors;
  }
  total_in_flight_ -= c.in_flight;
  if (c.state == Connection::State::kUp) ++down_;
  c.state = Connection::State::kDown;
  c.forget();
  close(c.fd);  // leaves the epoll set by that
  c.fd = -1;
  c.connect_at_ns = now_ + pause_ns;
}

void Generator::reconnect_due() {
  for (Connection& c : connections_) {
    if (c.state == Connection::State::kDown && c.connect_at_ns <= now_) start(c);
  }
}

void Generator::set_interest(Connection& c, bool write) {
  if (c.want_write == write) return;
  c.want_write = write;
  epoll_event event{};
  event.events = EPOLLIN | (write ? EPOLLOUT : 0u);
  event.data.ptr = &c;
  epoll_ctl(epoll_, EPOLL_CTL_MOD, c.fd, &event);
}

Status Generator::connect_all() {
  if (Status status = Endpoint::resolve(options_.address, &endpoint_); !status.is_ok()) return status;
  epoll_ = epoll_create1(EPOLL_CLOEXEC);
  if (epoll_ < 0) return {Code::kInternal, std::string("epoll_create1: ") + std::strerror(errno)};
  for (uint32_t i = 0; i < options_.connections; ++i) connections_.emplace_back(options_.depth);
  down_ = connections_.size();
  now_ = clock_ns();
  const int64_t until = now_ + kConnectTime;
  while (down_ != 0) {
    reconnect_due();
    if (!fault_.is_ok()) return fault_;
    const int n = wait(std::min(until, now_ + kSecond / 100));
    now_ = clock_ns();
    for (int i = 0; i < n; ++i) on_event(events_[i]);
    if (!fault_.is_ok()) return fault_;
    if (now_ >= next_watch_) tell();
    if (report_.stopped) return Status::ok();
    if (now_ >= until) {
      return {Code::kUnavailable, std::to_string(down_) + " of " + std::to_string(connections_.size()) +
                                      " connections to " + options_.address + " were not made in 10 s"};
    }
  }
  return Status::ok();
}

// ---- sending

Connection* Generator::pick() {
  if (total_in_flight_ == connections_.size() * options_.depth) return nullptr;
  for (size_t i = 0; i < connections_.size(); ++i) {
    Connection& c = connections_[turn_];
    if (++turn_ == connections_.size()) turn_ = 0;
    if (c.can_send()) return &c;
  }
  return nullptr;
}

// Sends what is due; at its bound it goes on when there is room again.
void Generator::send_due() {
  if (now_ < next_release_) return;
  for (;;) {
    const int64_t due = start_ + schedule_.offset_ns();
    if (due > now_ || due >= window_end_) {
      full_ = false;
      next_release_ = due >= window_end_ ? kNever : std::max(due, now_ + tick_ns_);
      break;
    }
    Connection* c = pick();
    if (c == nullptr && options_.shed) {
      report_.shed += in_window(due);
      schedule_.advance();
      continue;
    }
    if (c == nullptr) {
      held_until_ = now_;
      full_ = true;
      break;
    }
    if (due <= held_until_ && in_window(due)) ++report_.held_back;
    append(*c, due);
    schedule_.advance();
  }
  for (Connection* c : dirty_) {
    c->dirty = false;
    flush(*c);
  }
  dirty_.clear();
}

void Generator::append(Connection& c, int64_t due_ns) {
  const size_t count = requests_.count();
  uint32_t request;
  if (requests_.order.empty()) {
    request = static_cast<uint32_t>(position_);
    if (++position_ == count) position_ = 0;
  } else {
    request = requests_.order[position_];
    if (++position_ == requests_.order.size()) position_ = 0;
  }
  const uint64_t begin = requests_.offsets[request], size = requests_.offsets[request + 1] - begin;
  const uint32_t slot = c.take(due_ns, now_, request);
  ++total_in_flight_;
  uint8_t* out = c.output.room(size).data();
  std::memcpy(out, requests_.bytes.data() + begin, size);
  if (options_.protocol == Protocol::kMsgpackRpc) {
    const uint32_t msgid = c.msgid(slot);
    for (int i = 0; i < 4; ++i) out[3 + i] = static_cast<uint8_t>(msgid >> (24 - 8 * i));
  }
  c.output.filled(size);
  if (in_window(due_ns)) ++report_.sent;
  if (open_loop_ && !c.dirty) {
    c.dirty = true;
    dirty_.push_back(&c);
  }
}

// Closed loop: as many in flight as the depth.
void Generator::refill(Connection& c) {
  if (!sending() || now_ >= window_end_) return;
  while (c.can_send()) append(c, now_);
}

void Generator::flush(Connection& c) {
  if (c.state != Connection::State::kUp) return;
  while (!c.output.empty()) {
    const auto content = c.output.content();
    const ssize_t n = send(c.fd, content.data(), content.size(), MSG_NOSIGNAL);
    if (n < 0) {
      if (errno == EINTR) continue;
      if (errno == EAGAIN) return set_interest(c, true);
      return hang_up(c, true, reconnect_ns_);
    }
    report_.bytes_sent += static_cast<uint64_t>(n);
    c.output.consume(static_cast<size_t>(n));
  }
  set_interest(c, false);
}

// ---- receiving

void Generator::on_event(const epoll_event& event) {
  Connection& c = *static_cast<Connection*>(event.data.ptr);
  if (c.state == Connection::State::kConnecting) {
    int fault = 0;
    socklen_t size = sizeof(fault);
    getsockopt(c.fd, SOL_SOCKET, SO_ERROR, &fault, &size);
    if (fault != 0) {
      if (phase_ == Phase::kConnect) {
        fault_ = {Code::kUnavailable, "cannot connect to " + options_.address + ": " + std::strerror(fault)};
      }
      return hang_up(c, false, reconnect_ns_);
    }
    if ((event.events & EPOLLOUT) == 0) return;
    return established(c);
  }
  if (c.state != Connection::State::kUp) return;
  if ((event.events & (EPOLLIN | EPOLLHUP | EPOLLERR)) != 0) on_readable(c);
  if (c.state == Connection::State::kUp && (event.events & EPOLLOUT) != 0) flush(c);
}

void Generator::on_readable(Connection& c) {
  const auto room = c.input.room(kRead);
  const ssize_t n = recv(c.fd, room.data(), room.size(), 0);
  now_ = clock_ns();
  if (n < 0) {
    if (errno != EAGAIN && errno != EINTR) hang_up(c, true, reconnect_ns_);
    return;
  }
  if (n == 0) return hang_up(c, !(c.leaving && c.in_flight == 0), reconnect_ns_);
  report_.bytes_received += static_cast<uint64_t>(n);
  c.input.filled(static_cast<size_t>(n));
  if (!parse(c)) return hang_up(c, true, reconnect_ns_);
  if (c.leaving && c.in_flight == 0) return hang_up(c, false, 0);
  if (!open_loop_) {
    refill(c);
    flush(c);
  }
}

Judge Generator::judge_of(uint32_t request) {
  Judge judge;
  if (!requests_.expected.empty()) {
    const size_t k = requests_.scores_per_request;
    judge.expected = requests_.expected.subspan(request * k, k);
  }
  judge.tolerance = requests_.tolerance;
  judge.max_error = &report_.max_error;
  return judge;
}

// Judges every whole reply that has arrived; false: the connection is of no more use.
bool Generator::parse(Connection& c) {
  while (!c.input.empty()) {
    const auto stream = c.input.content();
    Reply reply;
    switch (options_.protocol) {
      case Protocol::kMsgpackRpc: {
        const Found found = c.rpc.next(stream, &reply);
        if (found == Found::kNeedMore) return true;
        if (found == Found::kBroken) return false;
        if (found == Found::kNotification) {
          c.leaving |= reply.goaway;
        } else if (reply.msgid == kGreetingId && !options_.greeting.empty()) {
          Judge judge;
          std::string_view code;
          const Outcome outcome = judge_rpc(reply, &judge, &code);
          if (outcome != Outcome::kOk) {
            fault_ = {
                static_cast<Code>(std::min<int>(static_cast<int>(outcome), 10)),
                options_.address + " refused the greeting: " + outcome_name(static_cast<size_t>(outcome))};
          }
        } else if (InFlight* one = c.find(reply.msgid); one == nullptr) {
          ++report_.unexpected;
        } else {
          Judge judge = judge_of(one->request);
          std::string_view code;
          const Outcome outcome = judge_rpc(reply, &judge, &code);
          if (outcome == Outcome::kOtherError && in_window(one->due_ns) &&
              report_.other_errors.size() < kMaxOtherErrors) {
            ++report_.other_errors[std::string(code.substr(0, 64))];
          }
          complete(c, one, outcome);
        }
        break;
      }
      case Protocol::kHttp: {
        const Found found = next_http(stream, &scratch_, &reply);
        if (found == Found::kNeedMore) return true;
        InFlight* one = c.oldest();
        if (found == Found::kBroken || one == nullptr) return false;
        Outcome outcome = Outcome::kHttpError;
        if (reply.status >= 200 && reply.status < 300) {
          Judge judge = judge_of(one->request);
          outcome = judge_body(reply.body, options_.body, options_.json_key, &judge) ? Outcome::kOk
                                                                                     : Outcome::kWrong;
        } else if (in_window(one->due_ns)) {
          ++report_.http_statuses[reply.status];
        }
        c.leaving |= reply.closes;
        complete(c, one, outcome);
        break;
      }
      case Protocol::kFixed: {
        InFlight* one = c.oldest();
        if (one == nullptr) return false;
        const uint64_t begin = requests_.offsets[one->request], end = requests_.offsets[one->request + 1];
        std::span<const uint8_t> expected = requests_.bytes.subspan(begin, end - begin);
        if (!options_.fixed_reply.empty()) {
          expected = {reinterpret_cast<const uint8_t*>(options_.fixed_reply.data()),
                      options_.fixed_reply.size()};
        }
        if (stream.size() < expected.size()) return true;
        reply.bytes = expected.size();
        const bool same = std::memcmp(stream.data(), expected.data(), expected.size()) == 0;
        complete(c, one, same ? Outcome::kOk : Outcome::kWrong);
        break;
      }
    }
    c.input.consume(reply.bytes);
  }
  return true;
}

void Generator::complete(Connection& c, InFlight* one, Outcome outcome) {
  const int64_t latency = now_ - one->due_ns;
  const bool ok = outcome == Outcome::kOk;
  ++(ok ? ok_ : failed_);
  if (in_window(one->due_ns)) {
    Report::ByOutcome& books = report_.outcomes[static_cast<size_t>(outcome)];
    books.latency.add(latency);
    if (open_loop_) books.from_send.add(now_ - one->sent_ns);
    if (ok && latency <= good_ns_) ++report_.good;
  }
  if (in_window(now_)) {
    if (ok) ++report_.answers_in_window;
    if (!report_.series.empty()) {
      const auto second = static_cast<size_t>((now_ - window_begin_) / kSecond);
      Second& books = report_.series[std::min(second, report_.series.size() - 1)];
      ++(ok ? books.answers_ok : books.answers_not_ok);
      if (ok) books.max_ns = std::max(books.max_ns, static_cast<uint64_t>(std::max<int64_t>(latency, 0)));
    }
  }
  c.release(one);
  --total_in_flight_;
}

// ---- time

int Generator::wait(int64_t until_ns) {
  const int64_t left = std::max<int64_t>(0, until_ns - now_);
  int n = -1;
#ifdef SYS_epoll_pwait2
  if (fine_waits_) {
    timespec time;
    time.tv_sec = left / kSecond;
    time.tv_nsec = left % kSecond;
    n = static_cast<int>(syscall(SYS_epoll_pwait2, epoll_, events_, kEvents, &time, nullptr, size_t{0}));
    if (n >= 0 || (errno != ENOSYS && errno != EPERM)) return n;
    fine_waits_ = false;
  }
#endif
  return epoll_wait(epoll_, events_, kEvents, static_cast<int>(left / 1'000'000));  // early: it looks again
}

void Generator::tell() {
  next_watch_ = now_ + kWatchEvery;
  const double seconds = start_ == 0 ? 0 : static_cast<double>(now_ - start_) / 1e9;
  if (!watch_({phase_, seconds, ok_, failed_})) report_.stopped = true;
}

void Generator::change_phase() {
  for (;;) {
    Phase next = phase_;
    if (phase_ == Phase::kConnect) {
      next = Phase::kWarmup;
    } else if (phase_ == Phase::kWarmup && now_ >= window_begin_) {
      next = Phase::kWindow;
      cpu_begin_ = thread_cpu_s();
    } else if (phase_ == Phase::kWindow && now_ >= window_end_) {
      next = Phase::kDrain;
      report_.thread_cpu_s = thread_cpu_s() - cpu_begin_;
    } else if (phase_ == Phase::kDrain) {
      const bool all_sent = !open_loop_ || start_ + schedule_.offset_ns() >= window_end_;
      if ((total_in_flight_ == 0 && all_sent) || now_ >= drain_end_) next = Phase::kDone;
    }
    if (next == phase_) return;
    phase_ = next;
    tell();
  }
}

// What is still open at the end.
void Generator::settle() {
  now_ = clock_ns();
  const bool cut = report_.stopped && now_ < window_end_;
  const int64_t end = cut ? now_ : window_end_;
  report_.window_s = std::max(0.0, static_cast<double>(end - window_begin_) / 1e9);
  if (phase_ == Phase::kWindow) report_.thread_cpu_s = thread_cpu_s() - cpu_begin_;
  for (const Connection& c : connections_) {
    for (const InFlight& one : c.slots) report_.unanswered += one.waiting && in_window(one.due_ns);
  }
  while (open_loop_) {
    const int64_t due = start_ + schedule_.offset_ns();
    if (due >= end) break;
    report_.unsent += in_window(due);
    schedule_.advance();
  }
  report_.due = report_.sent + report_.unsent + report_.shed;
}

Status Generator::run() {
  if (open_loop_) {  // the default slack would make each wait 50 us longer
    old_slack_ = prctl(PR_GET_TIMERSLACK);
    if (old_slack_ > 0) prctl(PR_SET_TIMERSLACK, 1000);
  }
  if (options_.series) report_.series.resize(static_cast<size_t>(std::ceil(options_.duration_s)));
  if (Status status = connect_all(); !status.is_ok() || report_.stopped) return status;
  start_ = now_ = clock_ns();
  window_begin_ = start_ + static_cast<int64_t>(options_.warmup_s * 1e9);
  window_end_ = window_begin_ + static_cast<int64_t>(options_.duration_s * 1e9);
  drain_end_ = window_end_ + static_cast<int64_t>(options_.drain_s * 1e9);
  change_phase();
  if (!open_loop_) {
    for (Connection& c : connections_) {
      refill(c);
      flush(c);
    }
  }
  while (!report_.stopped) {
    now_ = clock_ns();
    change_phase();
    if (phase_ == Phase::kDone) break;
    if (now_ >= next_watch_) tell();
    if (down_ != 0) reconnect_due();
    if (open_loop_) send_due();
    int64_t until = std::min({next_watch_, phase_ == Phase::kWarmup   ? window_begin_
                                           : phase_ == Phase::kWindow ? window_end_
                                                                      : drain_end_});
    if (open_loop_ && !full_) until = std::min(until, next_release_);
    if (down_ != 0) until = std::min(until, now_ + kSecond / 100);
    const int n = wait(until);
    now_ = clock_ns();
    for (int i = 0; i < n; ++i) on_event(events_[i]);
    if (!fault_.is_ok()) return fault_;
  }
  settle();
  return Status::ok();
}

Status in_range(const char* name, double value, double low, double high) {
  if (value >= low && value <= high) return Status::ok();
  const auto shown = [](double number) {
    std::string text = std::to_string(number);
    text.erase(text.find_last_not_of('0') + 1);
    if (text.back() == '.') text.pop_back();
    return text;
  };
  return Status::invalid(std::string(name) + " is " + shown(value) + "; expected " + shown(low) + " to " +
                         shown(high));
}

Status check(const Options& o, const Requests& r) {
  const struct {
    const char* name;
    double value, low, high;
  } kRanges[] = {{"connections", static_cast<double>(o.connections), 1, 65536},
                 {"in_flight", static_cast<double>(o.depth), 1, Options::kMaxDepth},
                 {"rate", o.rate, 0, 1e8},
                 {"warmup_s", o.warmup_s, 0, 3600},
                 {"duration_s", o.duration_s, 0.001, 86400},
                 {"drain_s", o.drain_s, 0, 3600},
                 {"tick_us", o.tick_us, 0, 1e6},
                 {"goodput_ms", o.goodput_ms, 0, 1e6},
                 {"reconnect_s", o.reconnect_s, 0, 3600},
                 {"tolerance", r.tolerance, 0, 1e300}};
  for (const auto& range : kRanges) {
    if (Status status = in_range(range.name, range.value, range.low, range.high); !status.is_ok()) {
      return status;
    }
  }
  if (r.count() == 0 || r.count() > UINT32_MAX)
    return Status::invalid("requests are none; expected at least one");
  if (r.offsets[0] != 0 || r.offsets.back() != r.bytes.size()) {
    return Status::invalid("offsets do not cover the requests; expected 0 first and their length last");
  }
  for (size_t i = 0; i < r.count(); ++i) {
    const std::string name = "request " + std::to_string(i);
    if (r.offsets[i + 1] <= r.offsets[i] || r.offsets[i + 1] > r.bytes.size()) {
      return Status::invalid(name + " is empty; expected rising offsets");
    }
    const uint8_t* p = r.bytes.data() + r.offsets[i];
    const uint64_t size = r.offsets[i + 1] - r.offsets[i];
    if (o.protocol == Protocol::kMsgpackRpc && (size < 9 || p[0] != 0x94 || p[1] != 0 || p[2] != 0xce)) {
      return Status::invalid(name + " is no MessagePack-RPC request with a uint32 msgid");
    }
  }
  for (const uint32_t i : r.order) {
    if (i >= r.count()) {
      return Status::invalid("order holds " + std::to_string(i) + "; expected less than the " +
                             std::to_string(r.count()) + " requests");
    }
  }
  if (!r.expected.empty() &&
      (r.scores_per_request == 0 || r.expected.size() != r.count() * r.scores_per_request)) {
    return Status::invalid("expected has " + std::to_string(r.expected.size()) + " scores; it needs " +
                           std::to_string(r.count()) + " x " + std::to_string(r.scores_per_request));
  }
  if (!o.greeting.empty() && o.protocol != Protocol::kMsgpackRpc) {
    return Status::invalid("a greeting is set; expected only with MessagePack-RPC");
  }
  return Status::ok();
}

}  // namespace

const char* outcome_name(size_t outcome) {
  if (outcome <= static_cast<size_t>(Code::kInternal)) return code_name(static_cast<Code>(outcome));
  constexpr const char* kNames[] = {"WRONG_ANSWER", "HTTP_ERROR", "OTHER_ERROR"};
  return kNames[outcome - static_cast<size_t>(Outcome::kWrong)];
}

Status run(const Options& options, const Requests& requests, const Watch& watch, Report* report) {
  if (Status status = check(options, requests); !status.is_ok()) return status;
  return Generator(options, requests, watch, report).run();
}

}  // namespace penstock::load
