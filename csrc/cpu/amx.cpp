// Whether AMX may be used. Its registers are 8 KB that the system saves with a thread, so a process has to ask for
// them: https://docs.kernel.org/arch/x86/xstate.html

#include "sweep.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fused_rin {

bool has_amx() {
#if defined(__x86_64__) && defined(__linux__) && defined(SYS_arch_prctl)
  unsigned a, b, c, d;
  constexpr unsigned kBFloat16 = 1u << 22, kTile = 1u << 24, kOsSaves = 1u << 27;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kBFloat16 | kTile)) != (kBFloat16 | kTile)) return false;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & kOsSaves)) return false;
  constexpr unsigned kTileConfig = 1u << 17, kTileData = 1u << 18;
  unsigned low, high;
  asm("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low & (kTileConfig | kTileData)) != (kTileConfig | kTileData)) return false;
  constexpr int kRequest = 0x1023, kTileDataState = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequest, kTileDataState) == 0;
#else
  return false;
#endif
}

bool has_amx_fp16() {
#if defined(__x86_64__) && defined(__linux__)
  unsigned a, b, c, d;
  constexpr unsigned kFloat16 = 1u << 21;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & kFloat16);
#else
  return false;
#endif
}

}  // namespace fused_rin
