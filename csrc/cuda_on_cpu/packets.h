// Stores to device memory that other blocks read while they run: each arrives some time later, whole, in shuffled
// order; those to one place in the order in which they were made. A load finds what has arrived, a thread's own stores
// too.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <vector>

namespace fused_rin::fibres {

class Packets {
 public:
  bool empty() const { return under_way_.empty(); }

  void store(void* to, const void* value, size_t bytes) {
    const char* const from = static_cast<const char*>(value);
    under_way_.push_back({static_cast<char*>(to), {from, from + bytes}});
  }

  // One arrives. Returns where.
  const char* deliver(size_t random) {
    const char* const place = under_way_[random % under_way_.size()].to;
    const auto first =
        std::find_if(under_way_.begin(), under_way_.end(), [=](const Store& s) { return s.to == place; });
    std::memcpy(first->to, first->value.data(), first->value.size());
    under_way_.erase(first);
    return place;
  }

 private:
  struct Store {
    char* to;
    std::vector<char> value;
  };
  std::vector<Store> under_way_;
};

}  // namespace fused_rin::fibres
