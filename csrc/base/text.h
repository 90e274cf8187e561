// Texts of others, made fit for messages.
#pragma once

#include <cstddef>
#include <string>

namespace penstock {

// Cut to `most` bytes at most, between two characters of UTF-8.
inline void cut_text(std::string* text, size_t most) {
  if (text->size() <= most) return;
  while (most > 0 && (static_cast<unsigned char>((*text)[most]) & 0xC0) == 0x80) --most;
  text->resize(most);
}

}  // namespace penstock
