#include "watched.h"

namespace fused_rin::fibres {
namespace {
constexpr size_t kWord = 4;  // granularity of the race detector
}

std::string describe(const char* verb, size_t bytes, uint32_t offset) {
  return std::string(verb) + " of " + std::to_string(bytes) + " bytes at offset " + std::to_string(offset);
}

WatchedMemory::WatchedMemory(size_t bytes, size_t first_warp, size_t warps)
    : size_(bytes), first_warp_(first_warp), warps_(warps), bytes_(bytes, static_cast<char>(0xff)) {
  const size_t words = bytes / kWord + 1;
  under_way_.resize(words);
  writes_.resize(words);
  reads_.resize(words * warps);
}

std::string WatchedMemory::access(uint32_t offset, size_t bytes, bool write, const Accessor& who) {
  const char* verb = write ? "write" : "read";
  if (offset % bytes) return "misaligned shared " + describe(verb, bytes, offset);
  if (offset + bytes > size_)
    return "shared " + describe(verb, bytes, offset) + ", outside the block's " + std::to_string(size_) + " bytes";
  for (size_t word = offset / kWord; word * kWord < offset + bytes; ++word)
    if (std::string wrong = note(word, write, who); !wrong.empty()) return wrong;
  return {};
}

void WatchedMemory::under_way(uint32_t offset, size_t bytes, bool yes) {
  for (size_t word = offset / kWord; word * kWord < offset + bytes; ++word) under_way_[word] = yes;
}

// Is an access known to (so: before) the next one of `who`?
bool WatchedMemory::ordered(const Access& earlier, const Accessor& who) {
  if (earlier.time == 0 || earlier.thread == who.thread) return true;
  const size_t warp = earlier.thread / kWarpSize;
  if (warp != who.warp()) return earlier.time <= who.clock[warp];
  return earlier.time < who.clock[warp] || earlier.lockstep != who.lockstep;
}

std::string WatchedMemory::note(size_t word, bool write, const Accessor& who) {
  const auto race = [&](int other, const char* what) {
    return "race: shared " + describe(write ? "write" : "read", kWord, word * kWord) + ", " + what + " by thread " +
           std::to_string(other) + " with no barrier between";
  };
  const Access now{who.clock[who.warp()], who.lockstep, who.thread};
  Access& last = writes_[word];
  if (under_way_[word])
    return "shared " + describe(write ? "write" : "read", kWord, word * kWord) + ", to which a copy is under way";
  if (!write && last.time == 0)
    return "shared " + describe("read", kWord, word * kWord) + ", which nothing has written";
  if (!ordered(last, who)) return race(last.thread, "written");
  Access* readers = &reads_[word * warps_];
  if (!write) {
    readers[who.warp() - first_warp_] = now;
    return {};
  }
  for (size_t w = 0; w < warps_; ++w)
    if (!ordered(readers[w], who)) return race(readers[w].thread, "read");
  last = now;
  return {};
}

}  // namespace fused_rin::fibres
