// Threads, and sums that do not depend on their number.
//
// A kernel divides its work into blocks whose bounds do not depend on the number of threads, keeps
// a partial result for each block, and adds these up in order, so that results are bitwise the same
// for any number of threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "vec.h"

#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#define PYFUSED_HAS_FORK 1
#endif

namespace pyfused {

#ifdef PYFUSED_HAS_FORK
// OpenMP's threads do not survive a fork, and a child that waits for them would hang. So a child
// runs on one thread.
inline bool forked = false;
inline const int fork_watch = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#else
constexpr bool forked = false;
#endif

// The blocks assigned to a thread, from which other threads steal. Aligned against false sharing.
struct alignas(64) Queue {
  std::atomic<int64_t> next;
  int64_t end;
};

// A thread takes a 32nd of a queue at a time, because an atomic operation waits for the stores
// before it, and non-temporal stores are slow. One block at a time takes 1.07 times as long at (8,
// 21, 256, 256), and schedule(dynamic), which spreads neighbouring blocks over threads, 1.2 times.
constexpr int64_t kSteps = 32;

// Work stealing: each thread runs its own queue and then the rest of the others' queues, so that no
// thread waits for one that the operating system has suspended. On two cores with another busy
// process, calls of some milliseconds are 1.1 to 1.25 times as fast as with schedule(static);
// alone, 1 to 1.05 times.
template <class Body> void parallel_for(int64_t blocks, int threads, const Body& body) {
  if (threads > blocks) threads = int(blocks);
#ifdef _OPENMP
  if (threads > 1 && !forked && !omp_in_parallel()) {
    std::vector<Queue> queues(threads);
    for (int i = 0; i < threads; ++i) {
      queues[i].next = blocks * i / threads;
      queues[i].end = blocks * (i + 1) / threads;
    }
    const int64_t step = std::max<int64_t>(1, blocks / (kSteps * threads));
#pragma omp parallel num_threads(threads)
    for (int i = 0; i < threads; ++i) {
      Queue& queue = queues[(omp_get_thread_num() + i) % threads];
      while (queue.next.load(std::memory_order_relaxed) < queue.end) {
        const int64_t first = queue.next.fetch_add(step, std::memory_order_relaxed);
        const int64_t end = std::min(queue.end, first + step);
        for (int64_t block = first; block < end; ++block) body(block);
      }
    }
    return;
  }
#endif
  for (int64_t block = 0; block < blocks; ++block) body(block);
}

// A compensated sum (Neumaier's variant of Kahan's).
class Sum {
 public:
  void add(double x) {
    const double next = sum + x;
    error += std::abs(sum) >= std::abs(x) ? (sum - next) + x : (x - next) + sum;
    sum = next;
  }
  double value() const { return std::isfinite(error) ? sum + error : sum; }

 private:
  double sum = 0, error = 0;
};

// Adds term(0) + ... + term(n - 1) to a sum. Groups of a few terms are summed in A and the groups
// in double, so that rounding errors do not grow with n. Where A is double, groups are smaller and
// the sum of the groups is compensated.
template <class A, class Term> PYFUSED_INLINE void add_terms(Sum& sum, int64_t n,
                                                             const Term& term) {
  constexpr bool kCompensated = std::is_same_v<A, double>;
#ifdef __SANITIZE_ADDRESS__  // its loops stay scalar: a group has no lanes
  constexpr int64_t kTermLanes = 1;
#else
  constexpr int64_t kTermLanes = kLanes<A>;
#endif
  constexpr int64_t kGroup = (kCompensated ? 4 : 8) * kTermLanes;
  const int64_t whole = n / kTermLanes * kTermLanes;
  double rest = 0;
  for (int64_t first = 0; first < whole; first += kGroup) {
    const int64_t end = std::min(whole, first + kGroup);
    A part = 0;
    PYFUSED_SIMD(reduction(+ : part))
    for (int64_t i = first; i < end; ++i) part += term(i);
    kCompensated ? sum.add(part) : void(rest += part);
  }
  for (int64_t i = whole; i < n; ++i) rest += double(term(i));
  sum.add(rest);
}

// The sum of partial results of elements of type T. It is compensated for double; for narrower
// types a double is exact enough.
template <class T> double total(const double* parts, int64_t n) {
  if constexpr (std::is_same_v<T, double>) {
    Sum sum;
    for (int64_t i = 0; i < n; ++i) sum.add(parts[i]);
    return sum.value();
  } else {
    double sum = 0;
    PYFUSED_SIMD(reduction(+ : sum))
    for (int64_t i = 0; i < n; ++i) sum += parts[i];
    return sum;
  }
}

}  // namespace pyfused
