// Threads, and sums that do not depend on the number of threads.
//
// A kernel divides its work into blocks whose bounds do not depend on the number of threads, keeps
// a partial result for each block, and adds these up in order, so that results are bitwise
// identical for any number of threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <new>
#include <string>
#include <type_traits>
#include <vector>

#include "vec.h"

namespace pyfused {

// ---- threads ------------------------------------------------------------------------------------

// Runs the blocks from `first` to `end`, with the memory of the thread that runs them.
using Blocks = void (*)(const void* data, int64_t first, int64_t end, void* memory);

// Calls body(data, first, end, memory) for ranges of blocks, on at most `threads` of torch's
// threads; the others return at once. No OpenMP runtime is linked; loading the module looks up the
// one that torch has loaded. Without a runtime, or within a parallel region, the calling thread
// runs all blocks.
//
// Each thread gets `bytes` of memory, aligned to vectors. It is allocated before the threads start,
// so that std::bad_alloc reaches the caller before anything is written. A body must not allocate,
// because an exception that leaves a parallel region ends the process.
void run_blocks(int64_t blocks, int threads, Blocks body, const void* data, size_t bytes);

// Calls body(data) on the calling thread, within a parallel region of torch's threads: libraries
// that use OpenMP, torch among them, run on one thread there. The body must not throw.
void run_on_one_thread(void (*body)(void*), void* data);

// The fewest elements for another thread, as in torch. Calls that need only one thread wake no
// other: waking takes as long as processing a few thousand elements, or millions if other processes
// are busy.
constexpr int64_t kThreadElements = 32768;
inline int threads_for(int64_t elements, int threads) {
  return int(std::clamp<int64_t>(elements / kThreadElements, 1, threads));
}

// A thread's memory for one Object at a time. Objects with buffers are created here instead of on
// the stack, which may be as small as 128 KiB.
template <class Object> struct Workspace {
  static_assert(alignof(Object) <= kVectorBytes && std::is_trivially_destructible_v<Object>);
  void* memory;

  template <class... Arguments> Object& make(const Arguments&... arguments) const {
    if constexpr (sizeof...(arguments) > 0) return *new (memory) Object(arguments...);
    else return *new (memory) Object;  // without (), which would fill its buffers with zeros
  }
};

struct NoBuffers {};  // the Object of a body that needs no memory

// Calls body(block, workspace) for each block. A workspace has room for an Object, or for `bytes`.
template <class Object, class Body>
void parallel_for(int64_t blocks, int threads, const Body& body, size_t bytes = sizeof(Object)) {
  const auto run = [](const void* body, int64_t first, int64_t end, void* memory) {
    const Workspace<Object> workspace{memory};
    for (int64_t block = first; block < end; ++block) {
      (*static_cast<const Body*>(body))(block, workspace);
    }
  };
  run_blocks(blocks, threads, run, &body, bytes);
}

// Calls body(first, end, workspace) for each block of `size` of n elements.
template <class Object, class Body>
void for_blocks(int64_t n, int64_t size, int threads, const Body& body,
                size_t bytes = sizeof(Object)) {
  const auto run = [&](int64_t block, auto workspace) {
    body(block * size, std::min(n, (block + 1) * size), workspace);
  };
  parallel_for<Object>((n + size - 1) / size, threads, run, bytes);
}

// Counters of parallel regions since measure_regions(true), for tests and benchmarks.
struct Regions {
  int64_t count;  // of the parallel regions
  double seconds;  // in calls with more than one block, on any number of threads
};
void measure_regions(bool enabled);
Regions measured_regions();

std::string runtime_file();  // the file of the OpenMP runtime; empty if none is loaded
int runtime_threads();  // the threads that the runtime starts by default

// While an object exists, the calling thread and the threads that run its blocks round results
// below the smallest normal number to 0. Many x86 processors take a hundred cycles for a subnormal
// result, and a softmax of masked scores has many of them. Has no effect on other processors.
class FlushSubnormals {
 public:
  FlushSubnormals();
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;
  ~FlushSubnormals();

 private:
  unsigned previous;
};

// ---- sums ---------------------------------------------------------------------------------------

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
// in double, so that rounding errors do not grow with n. Where A is double, the sum of the groups
// is compensated, and groups are smaller: at most 8 terms for each lane of a vector, which is
// shorter without AVX. Many equal terms, such as smoothed targets, have equal rounding errors,
// which add up.
template <class A, class Term> PYFUSED_INLINE void add_terms(Sum& sum, int64_t n,
                                                             const Term& term) {
  constexpr bool kCompensated = std::is_same_v<A, double>;
#ifdef __SANITIZE_ADDRESS__  // loops stay scalar, so groups have no lanes
  constexpr int64_t kTermLanes = 1;
#else
  constexpr int64_t kTermLanes = kLanes<A>;
#endif
#ifdef __AVX__
  constexpr int64_t kGroup = (kCompensated ? 4 : 8) * kTermLanes;
#else
  constexpr int64_t kGroup = (kCompensated ? 2 : 8) * kTermLanes;
#endif
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

// A sum of a few results of the accumulation type A: a double is exact enough for floats.
struct PlainSum {
  double sum = 0;
  void add(double x) { sum += x; }
  double value() const { return sum; }
};
template <class A> using SumOf = std::conditional_t<std::is_same_v<A, double>, Sum, PlainSum>;

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

// The sum of body(first, end, workspace) over the blocks, in their order.
template <class T, class Object, class Body>
double sum_of_blocks(int64_t n, int64_t size, int threads, const Body& body,
                     size_t bytes = sizeof(Object)) {
  std::vector<double> partial((n + size - 1) / size);
  const auto run = [&](int64_t first, int64_t end, auto workspace) {
    partial[first / size] = body(first, end, workspace);
  };
  for_blocks<Object>(n, size, threads, run, bytes);
  return total<T>(partial.data(), int64_t(partial.size()));
}

}  // namespace pyfused
