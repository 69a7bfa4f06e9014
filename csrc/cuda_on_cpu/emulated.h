// What tests hand to a kernel on fibres, across a C interface: the tensors that it may touch.
#pragma once

#include <launch.h>

#include <cstdint>
#include <cstdio>
#include <exception>

namespace fused_rin {

struct TensorView {
  const char* name;
  const void* data;
  int64_t bytes;
  int32_t writable;
};

// Runs `body` with launches confined to the tensors. Returns 0, or 1 with what was caught.
template <class Body>
int emulate(const TensorView* tensors, int count, char* message, int message_bytes, const Body& body) {
  launch_tensors.clear();
  for (int i = 0; i < count; ++i)
    launch_tensors.push_back(
        {tensors[i].name, tensors[i].data, static_cast<size_t>(tensors[i].bytes), tensors[i].writable != 0});
  try {
    body();
    return 0;
  } catch (const std::exception& error) {
    std::snprintf(message, message_bytes, "%s", error.what());
    return 1;
  }
}

}  // namespace fused_rin
