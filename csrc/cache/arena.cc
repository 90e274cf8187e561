#include "cache/arena.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

namespace penstock::arena {
namespace {

constexpr int kPopulateRead = 22;  // MADV_POPULATE_READ and _WRITE, which older C libraries do not name
constexpr int kPopulateWrite = 23;

Status failed(const std::string& what, int error) {
  const Code code = error == ENOMEM || error == ENOSPC || error == EDQUOT ? Code::kResourceExhausted
                                                                          : Code::kFailedPrecondition;
  return {code, what + ": " + std::strerror(error)};
}

std::string bytes_text(size_t bytes) {
  return std::to_string(bytes) + " bytes";
}

// The pages are had now: the first touch of a huge page takes milliseconds, which no request should pay.
bool populate(void* at, size_t bytes, int how) {
  (void)madvise(at, bytes, MADV_HUGEPAGE);                 // advice: small pages only cost speed
  return madvise(at, bytes, how) == 0 || errno == EINVAL;  // EINVAL: a kernel before 5.14
}

}  // namespace

Status map_private(size_t bytes, void** out) {
  void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (at == MAP_FAILED) return {Code::kResourceExhausted, "cannot map " + bytes_text(bytes)};
  if (!populate(at, bytes, kPopulateWrite) && errno == ENOMEM) {
    unmap(at, bytes);
    return {Code::kResourceExhausted, "there is no memory for the cache's " + bytes_text(bytes)};
  }
  *out = at;
  return {};
}

Status map_new(int fd, size_t bytes, void** out) {
  struct stat found{};
  if (fstat(fd, &found) != 0) return failed("the arena's file cannot be read", errno);
  if (found.st_size != 0) return {Code::kFailedPrecondition, "the arena's file is not empty"};
  const int error = posix_fallocate(fd, 0, static_cast<off_t>(bytes));
  if (error != 0) return failed("cannot reserve " + bytes_text(bytes) + " for the arena", error);
  void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (at == MAP_FAILED) return failed("cannot map " + bytes_text(bytes), errno);
  if (!populate(at, bytes, kPopulateWrite)) {
    const Status status = failed("cannot have " + bytes_text(bytes) + " for the arena", errno);
    unmap(at, bytes);
    return status;
  }
  *out = at;
  return {};
}

Status map_existing(int fd, size_t least, void** out, size_t* bytes) {
  struct stat found{};
  if (fstat(fd, &found) != 0) return failed("the arena's file cannot be read", errno);
  const auto size = static_cast<size_t>(found.st_size);
  if (size < least) {
    return {Code::kFailedPrecondition, "the file is no arena: it has " + bytes_text(size) +
                                           ", less than a header's " + bytes_text(least)};
  }
  void* at = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (at == MAP_FAILED) return failed("cannot map " + bytes_text(size), errno);
  (void)populate(at, size, kPopulateRead);
  *out = at;
  *bytes = size;
  return {};
}

void unmap(void* at, size_t bytes) {
  (void)munmap(at, bytes);
}

Status open_file(const std::string& path, int* fd) {
  *fd = ::open(path.c_str(), O_RDWR | O_CLOEXEC | O_NOFOLLOW);
  if (*fd < 0 && errno != ENOENT) return failed("arena '" + path + "' cannot be opened", errno);
  return {};
}

Status publish_file(const std::string& path, const std::function<Status(int fd)>& fill, bool* made) {
  *made = false;
  std::string scratch = path + ".new-XXXXXX";
  const int fd = mkostemp(scratch.data(), O_CLOEXEC);  // mode 0600
  if (fd < 0) return failed("arena '" + path + "' cannot be made", errno);
  Status status = fill(fd);
  ::close(fd);
  if (status.is_ok()) {
    *made = ::link(scratch.c_str(), path.c_str()) == 0;
    if (!*made && errno != EEXIST) status = failed("arena '" + path + "' cannot be made", errno);
  }
  (void)::unlink(scratch.c_str());
  return status;
}

}  // namespace penstock::arena
