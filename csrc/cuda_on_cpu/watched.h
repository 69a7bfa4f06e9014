// Shared memory of a block, every access of which is checked: against being uninitialised, overwritten by a copy that
// is under way, and against races, by vector clocks per warp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace fused_rin::fibres {

constexpr int kWarpSize = 32;

// Logical time: `clock[w]` is how much of warp w's past is known.
using Clock = std::vector<uint32_t>;

inline void join(Clock& into, const Clock& from) {
  for (size_t w = 0; w < into.size(); ++w)
    if (from[w] > into[w]) into[w] = from[w];
}

// Who touches memory: threads and warps are numbered through all blocks that run side by side.
struct Accessor {
  int thread;
  const Clock& clock;  // of its warp
  uint32_t lockstep;   // how often its warp has met at __syncwarp
  size_t warp() const { return thread / kWarpSize; }
};

class WatchedMemory {
 public:
  // `first_warp`: of the block that it belongs to, whose `warps` alone read it.
  WatchedMemory(size_t bytes, size_t first_warp, size_t warps);

  // Notes an access; what is wrong with it, or nothing.
  std::string access(uint32_t offset, size_t bytes, bool write, const Accessor& who);

  // What a copy is under way to is neither what was there nor what will be.
  void under_way(uint32_t offset, size_t bytes, bool yes);

  char* data() { return bytes_.data(); }
  size_t size() const { return size_; }

 private:
  struct Access {
    uint32_t time = 0;  // of the accessing warp; 0: never
    uint32_t lockstep = 0;
    int thread = -1;
  };

  static bool ordered(const Access& earlier, const Accessor& who);
  std::string note(size_t word, bool write, const Accessor& who);

  size_t size_, first_warp_, warps_;
  std::vector<char> bytes_;
  std::vector<bool> under_way_;         // per word
  std::vector<Access> writes_, reads_;  // per word; per word and warp
};

std::string describe(const char* verb, size_t bytes, uint32_t offset);

}  // namespace fused_rin::fibres
