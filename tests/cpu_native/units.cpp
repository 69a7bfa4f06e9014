// vdpbf16ps against what factor.h says it does, bit for bit. Built for a processor that has it.

#include <cmath>
#include <cstdio>
#include <random>

#define FUSED_RIN_ISA here
#include "../../csrc/cpu/factor.h"

#if !defined(__AVX512BF16__)
#error "compile with -mavx512bf16"
#endif

using namespace fused_rin::here;

int main() {
  std::mt19937 draw(1);
  long different = 0, not_numbers = 0;
  for (int i = 0; i < 1'000'000; ++i) {
    U32 u, x;
    F32 sum;
    for (int lane = 0; lane < 16; ++lane) {
      // Exponents within 2^-31 to 2^31, so that no product or sum is subnormal; every 16th number is Inf, NaN or zero.
      const auto half = [&] {
        const uint32_t bits = draw();
        const uint32_t special[] = {0x7f80, 0xff80, 0x7fc1, 0x0000, 0x8000};
        if (i % 2 && bits % 16 == 0) return special[bits / 16 % 5];
        return (bits & 0x8000) | ((bits >> 16) % 64 + 96) << 7 | (bits & 0x7f);
      };
      u[lane] = half() | half() << 16;
      x[lane] = half() | half() << 16;
      sum[lane] = std::ldexp(static_cast<float>(draw()) / 0x1p31f - 1, static_cast<int>(draw() % 64) - 32);
    }
    F32 got = sum;
    multiply_add(got, u, x);
    const F32 want = sum_of_pairs(sum, u, x);
    for (int lane = 0; lane < 16; ++lane) {
      if (std::isnan(want[lane])) {
        ++not_numbers;
        different += !std::isnan(got[lane]);
      } else {
        different += got[lane] != want[lane] || std::signbit(got[lane]) != std::signbit(want[lane]);
      }
    }
  }
  std::printf("%ld different, %ld not numbers\n", different, not_numbers);
  return different || !not_numbers ? 1 : 0;
}
