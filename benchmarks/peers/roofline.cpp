// What a core can do at most: multiply-adds a second by type, and bytes read a second by how many lie in reach.
//
//   roofline THREADS SECONDS_EACH     prints JSON; all threads work at once, sums over them; the best of 5 tries
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define ROOFLINE_TILES 1
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

using Clock = std::chrono::steady_clock;
double seconds() { return std::chrono::duration<double>(Clock::now().time_since_epoch()).count(); }

typedef float Floats __attribute__((vector_size(kBytes)));
typedef double Doubles __attribute__((vector_size(kBytes)));
typedef int64_t Words __attribute__((vector_size(kBytes)));

// Twelve sums: enough to hide a latency of 4 to 6 cycles on two units.
constexpr int kSums = 12;

template <class V>
void keep(V& value) {
  asm volatile("" : "+v"(value));
}
#if !defined(__x86_64__)
template <>
void keep(Floats& value) {
  asm volatile("" : "+w"(value));
}
template <>
void keep(Doubles& value) {
  asm volatile("" : "+w"(value));
}
template <>
void keep(Words& value) {
  asm volatile("" : "+w"(value));
}
#endif

// Operations of `rounds` rounds.
template <class V, class T>
double multiply_add(int64_t rounds) {
  V sums[kSums] = {}, a = {}, b = {};
  for (int i = 0; i < static_cast<int>(kBytes / sizeof(T)); i++) a[i] = T(0.5), b[i] = T(0.25);
  for (int64_t r = 0; r < rounds; r++) {
    for (auto& sum : sums) {
      sum = sum * a + b;
      keep(sum);
    }
  }
  return 2.0 * rounds * kSums * (kBytes / sizeof(T));
}

#if defined(__AVX512BF16__)
double multiply_add_pairs(int64_t rounds) {
  __m512 sums[kSums] = {};
  __m512bh a = (__m512bh)_mm512_set1_epi16(0x3e80), b = a;
  for (int64_t r = 0; r < rounds; r++) {
    for (auto& sum : sums) {
      sum = _mm512_dpbf16_ps(sum, a, b);
      keep(sum);
    }
  }
  return 2.0 * rounds * kSums * 32;
}
#endif

#if ROOFLINE_TILES
// Leave to use tiles is a process's to ask for: https://docs.kernel.org/arch/x86/xstate.html
bool may_use_tiles() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

// Four tiles of sums, each of two tiles of either factor used twice. 16 rows x 16 columns x 16 pairs an instruction.
double multiply_add_tiles(int64_t rounds) {
  struct alignas(64) Shapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } shapes;
  asm volatile("ldtilecfg %0" ::"m"(shapes));  // all tiles are zero after it; the intrinsic reads 8 bytes of these 64
  for (int64_t r = 0; r < rounds; r++) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
  return 2.0 * rounds * 4 * 16 * 16 * 32;
}
#endif

// Bytes read in `rounds` passes over `size` bytes of the thread's own.
double read(const std::vector<Words>& data, int64_t rounds) {
  Words sums[8] = {};
  for (int64_t r = 0; r < rounds; r++) {
    for (size_t i = 0; i + 8 <= data.size(); i += 8) {
      for (int j = 0; j < 8; j++) sums[j] ^= data[i + j];
    }
    for (auto& sum : sums) keep(sum);
  }
  return 1.0 * rounds * (data.size() / 8 * 8) * kBytes;
}

// Of `work(thread, rounds)`, summed over the threads, with so many rounds that it takes `wanted` seconds.
double rate(int threads, double wanted, const std::function<double(int, int64_t)>& work) {
  int64_t rounds = 1;
  for (;; rounds *= 2) {
    double start = seconds();
    work(0, rounds);
    double took = seconds() - start;
    if (took > wanted / 4) {
      rounds = static_cast<int64_t>(rounds * wanted / took) + 1;
      break;
    }
  }
  double best = 0;
  for (int attempt = 0; attempt < 5; attempt++) {
    std::atomic<int> ready{0};
    std::vector<double> rates(threads);
    std::vector<std::thread> team;
    for (int t = 0; t < threads; t++) {
      team.emplace_back([&, t] {
        ready++;
        while (ready < threads) {
        }
        double start = seconds();
        double done = work(t, rounds);
        rates[t] = done / (seconds() - start);
      });
    }
    double sum = 0;
    for (int t = 0; t < threads; t++) team[t].join(), sum += rates[t];
    best = sum > best ? sum : best;
  }
  return best;
}

}  // namespace

int main(int argc, char** argv) {
  int threads = argc > 1 ? std::atoi(argv[1]) : 1;
  double wanted = argc > 2 ? std::atof(argv[2]) : 0.02;
  if (threads < 1 || !(wanted > 0)) {
    std::fprintf(stderr, "roofline THREADS SECONDS: both above 0, got %d and %g\n", threads, wanted);
    return 2;
  }
  auto print = [&](const char* name, double value) { std::printf("\"%s\": %.2f", name, value / 1e9); };
  std::printf("{\"gflops\": {");
  print("float32", rate(threads, wanted, [](int, int64_t n) { return multiply_add<Floats, float>(n); }));
  std::printf(", ");
  print("float64", rate(threads, wanted, [](int, int64_t n) { return multiply_add<Doubles, double>(n); }));
#if defined(__AVX512BF16__)
  std::printf(", ");
  double pairs = rate(threads, wanted, [](int, int64_t n) { return multiply_add_pairs(n); });
#if ROOFLINE_TILES
  if (may_use_tiles()) pairs = rate(threads, wanted, [](int, int64_t n) { return multiply_add_tiles(n); });
#endif
  print("bfloat16", pairs);
#endif
  std::printf("}, \"read_gbs\": {");
  const int64_t kSizes[] = {16 << 10, 64 << 10, 256 << 10, 512 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20};
  for (int64_t size : kSizes) {
    std::vector<std::vector<Words>> data(threads, std::vector<Words>(size / kBytes, Words{1}));
    if (size != kSizes[0]) std::printf(", ");
    print(std::to_string(size).c_str(), rate(threads, wanted, [&](int t, int64_t n) { return read(data[t], n); }));
  }
  std::printf("}}\n");
}
