// An OpenMP runtime with libgomp's function for a parallel region, or with Clang's, as on macOS and
// Windows; see kmp.h in LLVM's openmp. ThreadSanitizer sees all of its synchronisation, unlike
// libgomp's barriers, so `make sanitize` preloads it, and torch and csrc/parallel.cpp find it
// first.
#include <atomic>
#include <cstdarg>
#include <cstdint>
#include <thread>
#include <vector>

#define EXPORTED extern "C" __attribute__((visibility("default")))

static std::atomic<int> max_threads = 1;  // torch sets it in each thread
static thread_local int team_size = 1, team_member = 0;

EXPORTED int omp_get_max_threads() { return max_threads; }
EXPORTED void omp_set_num_threads(int count) { max_threads = count; }
EXPORTED int omp_get_num_threads() { return team_size; }
EXPORTED int omp_get_thread_num() { return team_member; }
EXPORTED int omp_in_parallel() { return team_size > 1; }

template <class Body> void run_team(int threads, Body body) {
  const auto work = [=](int member) {
    team_size = threads;
    team_member = member;
    body(member);
    team_size = 1;
    team_member = 0;
  };
  std::vector<std::thread> others;
  for (int member = 1; member < threads; ++member) others.emplace_back(work, member);
  work(0);
  for (std::thread& other : others) other.join();
}

#ifdef LLVM_RUNTIME
EXPORTED void __kmpc_fork_call(void*, int32_t arguments,
                               void (*task)(int32_t*, int32_t*, void*, void*), ...) {
  va_list list;
  va_start(list, task);
  void* const first = va_arg(list, void*);
  void* const second = va_arg(list, void*);
  va_end(list);
  if (arguments != 2) return;
  run_team(max_threads, [=](int32_t member) { task(&member, &member, first, second); });
}
#else
EXPORTED void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
  run_team(threads ? int(threads) : max_threads.load(), [=](int) { body(data); });
}
#endif
