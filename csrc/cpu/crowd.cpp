#include "crowd.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif

namespace fused_rin {
namespace {

constexpr int64_t kSecond = 1000000000;
constexpr int64_t kQuotaIsFresh = kSecond;  // a look at the files takes 50 us
constexpr int64_t kFirstCalm = kSecond / 10, kLongestCalm = 30 * kSecond;

int affinity() {
#if defined(__linux__)
  cpu_set_t usual;
  if (sched_getaffinity(0, sizeof usual, &usual) == 0) return CPU_COUNT(&usual);
  // Refused where the kernel has more bits, on machines of more than 1,024 processors.
  for (int most = 4 * CPU_SETSIZE; most <= 1 << 16; most *= 4) {
    cpu_set_t* const set = CPU_ALLOC(static_cast<size_t>(most));
    if (!set) break;
    const size_t bytes = CPU_ALLOC_SIZE(static_cast<size_t>(most));
    const int count = sched_getaffinity(0, bytes, set) == 0 ? CPU_COUNT_S(bytes, set) : 0;
    CPU_FREE(set);
    if (count > 0) return count;
  }
#endif
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

// "max 100000", or 150000 of every 100000 microseconds.
double quota_in(const std::string& text) {
  std::istringstream in(text);
  std::string quota;
  double period = 0;
  if (!(in >> quota >> period) || quota == "max" || period <= 0) return 0;
  const double microseconds = std::strtod(quota.c_str(), nullptr);
  return microseconds > 0 ? microseconds / period : 0;  // -1: none
}

std::string first_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

// The least quota of a group and of those above it; `read` gives that of a folder, 0 if it has none.
template <class Read>
double least_quota(const std::string& mount, std::string group, Read read) {
  double least = 0;
  for (;;) {
    const double quota = read(mount + group);
    if (quota > 0 && (least == 0 || quota < least)) least = quota;
    if (group.empty()) return least;
    group.erase(group.rfind('/') == std::string::npos ? 0 : group.rfind('/'));
  }
}

bool names_cpu(const std::string& controllers) {
  std::istringstream in(controllers);
  for (std::string name; std::getline(in, name, ',');) {
    if (name == "cpu") return true;
  }
  return false;
}

std::atomic<int64_t> calm_until{0}, calm_length{0};
std::atomic<int> assumed{0};

}  // namespace

double processor_quota(const std::string& root) {
  std::ifstream groups(root + "/proc/self/cgroup");
  double least = 0;
  for (std::string line; std::getline(groups, line);) {  // number:controllers:group
    const size_t first = line.find(':'), second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    std::string group = line.substr(second + 1);
    while (!group.empty() && group.back() == '/') group.pop_back();
    double quota = 0;
    if (controllers.empty()) {
      quota = least_quota(root + "/sys/fs/cgroup", group,
                          [](const std::string& folder) { return quota_in(first_line(folder + "/cpu.max")); });
    } else if (names_cpu(controllers)) {
      for (const char* name : {"/sys/fs/cgroup/cpu", "/sys/fs/cgroup/cpu,cpuacct"}) {
        quota = least_quota(root + name, group, [](const std::string& folder) {
          return quota_in(first_line(folder + "/cpu.cfs_quota_us") + " " + first_line(folder + "/cpu.cfs_period_us"));
        });
        if (quota > 0) break;
      }
    }
    if (quota > 0 && (least == 0 || quota < least)) least = quota;
  }
  return least;
}

int usable_processors() {
  static std::atomic<int64_t> looked{-kQuotaIsFresh};
  static std::atomic<int> allowed{0};
  const int64_t now = now_ns();
  if (now - looked.load(std::memory_order_relaxed) >= kQuotaIsFresh) {
    looked.store(now, std::memory_order_relaxed);
    const double quota = processor_quota("");
    allowed.store(quota > 0 ? static_cast<int>(std::ceil(quota)) : 0, std::memory_order_relaxed);
  }
  const int most = allowed.load(std::memory_order_relaxed), here = affinity();
  return most > 0 ? std::min(most, here) : here;
}

Company company_of(int wanted) {
  if (wanted <= 1) return {};
  const int given = assumed.load(std::memory_order_relaxed), most = given ? given : usable_processors();
  return {std::min(wanted, most), wanted <= most ? wanted : 0, is_crowded()};
}

bool are_assumed() { return assumed.load(std::memory_order_relaxed) != 0; }

void assume_processors(int count) { assumed.store(count, std::memory_order_relaxed); }

bool is_crowded() { return now_ns() < calm_until.load(std::memory_order_relaxed); }

void found_crowded() {
  if (assumed.load(std::memory_order_relaxed)) return;
  const int64_t now = now_ns(), until = calm_until.load(std::memory_order_relaxed);
  if (now < until) return;  // another call has said it
  const int64_t last = calm_length.load(std::memory_order_relaxed);
  const int64_t length = last && now - until < last ? std::min(2 * last, kLongestCalm) : kFirstCalm;
  calm_length.store(length, std::memory_order_relaxed);
  calm_until.store(now + length, std::memory_order_relaxed);
}

void forget_crowds() {
  calm_until.store(0, std::memory_order_relaxed);
  calm_length.store(0, std::memory_order_relaxed);
}

int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

}  // namespace fused_rin
