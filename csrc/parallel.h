// The only place that decides how work is spread over threads.
//
// A kernel names fixed blocks whose bounds do not depend on the number of threads, keeps one
// partial result a block, and adds the partials up in order: the result has the same bits for any
// count.
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
// OpenMP's threads do not survive a fork, and a child that waits for them hangs: it works alone.
inline bool forked = false;
inline const int fork_watch = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#else
constexpr bool forked = false;
#endif

// A thread's own blocks. Whoever takes some moves `next`, on a cache line that nobody else writes
// to.
struct alignas(64) Share {
  std::atomic<int64_t> next;
  int64_t end;
};

// What is taken at once is a 32nd of a share: an atomic operation waits until the stores before it
// have left the core, and those past the cache are slow. One block at a time takes 1.07 times as
// long at (8, 21, 256, 256), and with schedule(dynamic), which spreads neighbouring blocks, 1.2
// times.
constexpr int64_t kParts = 32;

// Each thread works off its share, and then what is left of the others': nobody waits for all that
// a thread had to do which was put aside. Beside one process that computes, on two cores, calls of
// some milliseconds are 1.1 to 1.25 times as fast as with schedule(static); alone, 1 to 1.05 times.
template <class Body> void parallel_for(int64_t blocks, int threads, const Body& body) {
  if (threads > blocks) threads = int(blocks);
#ifdef _OPENMP
  if (threads > 1 && !forked && !omp_in_parallel()) {
    std::vector<Share> shares(threads);
    for (int i = 0; i < threads; ++i) {
      shares[i].next = blocks * i / threads;
      shares[i].end = blocks * (i + 1) / threads;
    }
    const int64_t part = std::max<int64_t>(1, blocks / (kParts * threads));
#pragma omp parallel num_threads(threads)
    for (int i = 0; i < threads; ++i) {
      Share& share = shares[(omp_get_thread_num() + i) % threads];
      while (share.next.load(std::memory_order_relaxed) < share.end) {
        const int64_t first = share.next.fetch_add(part, std::memory_order_relaxed);
        const int64_t end = std::min(share.end, first + part);
        for (int64_t block = first; block < end; ++block) body(block);
      }
    }
    return;
  }
#endif
  for (int64_t block = 0; block < blocks; ++block) body(block);
}

// A sum that carries its rounding error along (Neumaier's variant of Kahan's).
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

// Adds term(0) + ... + term(n - 1) to a sum: few at a time in A, so that rounding errors do not
// grow with n, and these parts in a double, or, fewer still, with their error carried along where A
// is one.
template <class A, class Term> PYFUSED_INLINE void add_terms(Sum& sum, int64_t n,
                                                             const Term& term) {
  constexpr bool kCarries = std::is_same_v<A, double>;
#ifdef __SANITIZE_ADDRESS__  // whose loops stay scalar: no lanes share the terms of a part
  constexpr int64_t kSideBySide = 1;
#else
  constexpr int64_t kSideBySide = kLanes<A>;
#endif
  constexpr int64_t kGroup = (kCarries ? 4 : 8) * kSideBySide;
  const int64_t whole = n / kSideBySide * kSideBySide;
  double rest = 0;
  for (int64_t first = 0; first < whole; first += kGroup) {
    const int64_t end = std::min(whole, first + kGroup);
    A part = 0;
    PYFUSED_SIMD(reduction(+ : part))
    for (int64_t i = first; i < end; ++i) part += term(i);
    kCarries ? sum.add(part) : void(rest += part);
  }
  for (int64_t i = whole; i < n; ++i) rest += double(term(i));
  sum.add(rest);
}

// The sum of what was computed from elements of type T. A double has bits to spare for the rounding
// errors of narrower types.
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
