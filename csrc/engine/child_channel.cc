#include "engine/child_channel.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <limits>

namespace penstock {
namespace {

int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

Status unavailable(std::string text) {
  return {Code::kUnavailable, std::move(text)};
}

Status failed(const char* what) {
  return {Code::kInternal, std::string(what) + " failed: " + std::strerror(errno)};
}

// A text from the child, made harmless: printable ASCII, one line.
std::string plain(const char* text, size_t n) {
  std::string out(text, n);
  for (char& c : out) {
    if (static_cast<unsigned char>(c) < 0x20) c = ' ';
    if (static_cast<unsigned char>(c) >= 0x7f) c = '?';
  }
  return out;
}

}  // namespace

Status ChildChannel::create(size_t n_features, const ScoreRule& rule, int64_t run_timeout_ns,
                            std::shared_ptr<ChildChannel>* out) {
  std::shared_ptr<ChildChannel> made(new ChildChannel(n_features, rule, run_timeout_ns));
  const size_t bytes = block_bytes(n_features, rule.width);
  made->memory_fd_ = memfd_create("penstock-rows", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (made->memory_fd_ < 0) return failed("memfd_create");
  if (ftruncate(made->memory_fd_, static_cast<off_t>(bytes)) != 0) return failed("ftruncate");
  // The child cannot cut the block off under this process.
  if (fcntl(made->memory_fd_, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0)
    return failed("sealing the shared memory");
  void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, made->memory_fd_, 0);
  if (at == MAP_FAILED) return failed("mmap");
  made->block_ = static_cast<uint8_t*>(at);
  made->alarm_fd_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  made->close_fd_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (made->alarm_fd_ < 0 || made->close_fd_ < 0) return failed("eventfd");
  *out = std::move(made);
  return {};
}

ChildChannel::~ChildChannel() {
  drop_child();
  if (block_ != nullptr) munmap(block_, block_bytes(n_features_, rule_.width));
  for (const int fd : {memory_fd_, alarm_fd_, close_fd_}) {
    if (fd >= 0) ::close(fd);
  }
}

void ChildChannel::drop_child() {
  if (socket_ >= 0) ::close(socket_);
  if (pidfd_ >= 0) ::close(pidfd_);
  socket_ = pidfd_ = -1;
}

void ChildChannel::read_alarm() {
  uint64_t count;
  (void)!::read(alarm_fd_, &count, sizeof count);
}

void ChildChannel::attach(int socket, int pidfd, int64_t restart_ns) {
  const std::lock_guard lock(mutex_);
  drop_child();
  socket_ = socket;
  pidfd_ = pidfd;
  restart_ns_ = restart_ns;
}

void ChildChannel::detach(std::string reason) {
  const std::lock_guard lock(mutex_);
  drop_child();
  reason_ = std::move(reason);
}

std::string ChildChannel::reason() {
  const std::lock_guard lock(mutex_);
  return reason_;
}

void ChildChannel::expect_after(int64_t delay_ns) {
  ready_at_ns_.store(now_ns() + delay_ns, std::memory_order_relaxed);
}

void ChildChannel::close() {
  closed_.store(true, std::memory_order_release);
  const uint64_t one = 1;
  (void)!::write(close_fd_, &one, sizeof one);
}

int64_t ChildChannel::retry_after_ms() const {
  const int64_t left = ready_at_ns_.load(std::memory_order_relaxed) - now_ns();
  return std::max<int64_t>(1, (left + 999'999) / 1'000'000);
}

Status ChildChannel::lost(std::string reason) {
  drop_child();
  reason_ = reason;
  expect_after(restart_ns_);
  const uint64_t one = 1;
  (void)!::write(alarm_fd_, &one, sizeof one);
  return unavailable("the run failed: " + std::move(reason));
}

Status ChildChannel::run(const float* rows, size_t n, double* scores) {
  const std::lock_guard lock(mutex_);
  if (closed_.load(std::memory_order_acquire)) return unavailable("the model was unloaded");
  if (socket_ < 0) return unavailable("the model cannot run now: " + reason_);
  std::memcpy(block_, rows, n * n_features_ * sizeof(float));
  const Call call{++sequence_, static_cast<uint32_t>(n)};
  ssize_t sent;
  do {
    sent = ::send(socket_, &call, sizeof call, MSG_NOSIGNAL | MSG_DONTWAIT);
  } while (sent < 0 && errno == EINTR);
  if (sent != static_cast<ssize_t>(sizeof call)) return lost("its process is gone");
  const int64_t until = now_ns() + run_timeout_ns_;
  pollfd fds[] = {{socket_, POLLIN, 0}, {close_fd_, POLLIN, 0}, {pidfd_, POLLIN, 0}};  // fd -1 is passed over
  for (;;) {
    const int64_t left = until - now_ns();
    if (left <= 0) {
      return lost("its process gave no answer within " + std::to_string(run_timeout_ns_ / 1'000'000) + " ms");
    }
    const int64_t ms = std::min<int64_t>((left + 999'999) / 1'000'000, std::numeric_limits<int>::max());
    if (::poll(fds, 3, static_cast<int>(ms)) < 0) {
      if (errno == EINTR) continue;
      return lost(std::string("poll failed: ") + std::strerror(errno));
    }
    // A reply counts even if its sender died right after it; so the socket is looked at first.
    Reply reply{};
    const ssize_t got = ::recv(socket_, &reply, sizeof reply, MSG_DONTWAIT);
    if (got == static_cast<ssize_t>(sizeof reply)) {
      if (reply.sequence != call.sequence) return lost("its process answered another call");
      if (reply.failed != 0) {
        const auto* text = reinterpret_cast<const char*>(block_ + text_offset(n_features_, rule_.width));
        return {Code::kInternal,
                "the model raised " + plain(text, std::min<size_t>(reply.text_bytes, kTextBytes))};
      }
      rule_.apply(reinterpret_cast<const double*>(block_ + scores_offset(n_features_)), n, scores);
      return {};
    }
    if (got >= 0) return lost(got == 0 ? "its process died" : "its process broke the protocol");
    if (errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR) return lost("its process died");
    if (fds[2].revents != 0 && fds[0].revents == 0) return lost("its process died");
    if (closed_.load(std::memory_order_acquire)) return unavailable("the model was unloaded");
  }
}

}  // namespace penstock
