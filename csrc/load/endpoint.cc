#include "load/endpoint.h"

#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string_view>

namespace penstock::load {

Status Endpoint::resolve(const std::string& address, Endpoint* endpoint) {
  constexpr std::string_view kUnix = "unix://", kTcp = "tcp://";
  if (address.starts_with(kUnix)) {
    const std::string path = address.substr(kUnix.size());
    auto* un = reinterpret_cast<sockaddr_un*>(&endpoint->address_);
    if (path.empty() || path.size() >= sizeof(un->sun_path)) {
      return Status::invalid("address is '" + address + "'; expected a path of 1 to 107 bytes after unix://");
    }
    un->sun_family = AF_UNIX;
    std::memcpy(un->sun_path, path.c_str(), path.size() + 1);
    endpoint->size_ = sizeof(sockaddr_un);
    return Status::ok();
  }
  const size_t colon = address.rfind(':');
  if (!address.starts_with(kTcp) || colon < kTcp.size() || colon + 1 == address.size()) {
    return Status::invalid("address is '" + address + "'; expected tcp://HOST:PORT or unix://PATH");
  }
  std::string host = address.substr(kTcp.size(), colon - kTcp.size());
  if (host.size() > 2 && host.front() == '[' && host.back() == ']') host = host.substr(1, host.size() - 2);
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  const int fault = getaddrinfo(host.c_str(), address.c_str() + colon + 1, &hints, &found);
  if (fault != 0) return Status::invalid("address is '" + address + "': " + gai_strerror(fault));
  const addrinfo* chosen = found;
  for (const addrinfo* one = found; found->ai_next != nullptr && one != nullptr; one = one->ai_next) {
    const int fd =
        socket(one->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);  // a name with several: the first that listens
    const bool listens = fd >= 0 && ::connect(fd, one->ai_addr, one->ai_addrlen) == 0;
    if (fd >= 0) close(fd);
    if (!listens) continue;
    chosen = one;
    break;
  }
  std::memcpy(&endpoint->address_, chosen->ai_addr, chosen->ai_addrlen);
  endpoint->size_ = chosen->ai_addrlen;
  freeaddrinfo(found);
  return Status::ok();
}

int Endpoint::connect() const {
  const int fd = socket(address_.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  if (fd < 0) return -1;
  if (address_.ss_family != AF_UNIX) {
    const int on = 1;
    (void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
  }
  if (::connect(fd, reinterpret_cast<const sockaddr*>(&address_), size_) != 0 && errno != EINPROGRESS) {
    const int fault = errno;  // EAGAIN: a Unix socket's backlog is full
    close(fd);
    errno = fault;
    return -1;
  }
  return fd;
}

}  // namespace penstock::load
