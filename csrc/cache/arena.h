// The memory of a cache: private, or a file (or memfd) that several processes map.
//
// A new file's pages are reserved before anything is written to it, so that a full disk is an error here and
// never a signal later. A file gets its name only when its content is whole (publish_file), so that whoever
// opens it finds all of it. Setup only; no thread touches the memory yet.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

#include "base/status.h"

namespace penstock::arena {

// `bytes` zeros of this process alone.
Status map_private(size_t bytes, void** out);
// Makes the empty file `fd` `bytes` long, all zeros, and maps it shared.
Status map_new(int fd, size_t bytes, void** out);
// Maps the whole of `fd` shared; refuses one shorter than `least`.
Status map_existing(int fd, size_t least, void** out, size_t* bytes);
void unmap(void* at, size_t bytes);

// Opens the file at `path` for reading and writing; *fd is -1 if there is none.
Status open_file(const std::string& path, int* fd);
// Makes a file at `path`, readable by this user alone, in one step: `fill` writes it while it has no name.
// Sets *made false, without an error, if another process had put a file there.
Status publish_file(const std::string& path, const std::function<Status(int fd)>& fill, bool* made);

}  // namespace penstock::arena
