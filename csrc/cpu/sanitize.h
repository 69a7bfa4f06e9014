// What the sanitizers cannot see by themselves; nothing in other builds.
#pragma once

#include <cstddef>

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define FUSED_RIN_ASAN 1
#endif
#if __has_feature(thread_sanitizer)
#define FUSED_RIN_TSAN 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#define FUSED_RIN_ASAN 1
#endif
#if defined(__SANITIZE_THREAD__)
#define FUSED_RIN_TSAN 1
#endif

#if FUSED_RIN_ASAN
#include <sanitizer/asan_interface.h>
#endif
#if FUSED_RIN_TSAN
#include <sanitizer/tsan_interface.h>
#endif

namespace fused_rin {

// The pieces of one allocation are neighbours: memory between them that nobody may touch makes a step out of one
// visible.
#if FUSED_RIN_ASAN
constexpr size_t kForbiddenBytes = 128;
inline void forbid(const char* begin, const char* end) {
  __asan_poison_memory_region(begin, static_cast<size_t>(end - begin));
}
inline void allow(const char* begin, size_t bytes) { __asan_unpoison_memory_region(begin, bytes); }
#else
constexpr size_t kForbiddenBytes = 0;
inline void forbid(const char*, const char*) {}
inline void allow(const char*, size_t) {}
#endif

// What lies before `ends_before(x)` in one thread happens before what lies after `begins_after(x)` in another: an order
// that an OpenMP runtime keeps, which no sanitizer was built into.
#if FUSED_RIN_TSAN
inline void ends_before(void* x) { __tsan_release(x); }
inline void begins_after(void* x) { __tsan_acquire(x); }
#else
inline void ends_before(void*) {}
inline void begins_after(void*) {}
#endif

}  // namespace fused_rin
