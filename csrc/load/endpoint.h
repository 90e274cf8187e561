// Where a server listens, resolved once, and connecting to it without blocking. Any thread.
#pragma once

#include <sys/socket.h>

#include <string>

#include "base/status.h"

namespace penstock::load {

class Endpoint {
 public:
  // `address` is tcp://HOST:PORT ([HOST] for IPv6) or unix://PATH. A name is looked up here, and
  // the first of its addresses that listens is taken: both may block.
  static Status resolve(const std::string& address, Endpoint* endpoint);

  // A non-blocking socket that is connecting or connected; -1 with errno set.
  int connect() const;

 private:
  sockaddr_storage address_{};
  socklen_t size_ = 0;
};

}  // namespace penstock::load
