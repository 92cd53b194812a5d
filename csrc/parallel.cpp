#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>
#include <utility>
#include <vector>

#ifdef _WIN32
#define NOMINMAX
#include <windows.h>
#else
#include <dlfcn.h>
#include <pthread.h>
#endif
#ifdef __SSE2__
#include <immintrin.h>
#endif

namespace pyfused {
namespace {

// ---- the OpenMP runtime that torch has loaded ---------------------------------------------------

// Calls body(data) on each thread of a team. If `threads` is 0, the runtime chooses their number.
using Parallel = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

struct Runtime {
  std::string file;
  Parallel parallel = nullptr;  // null: there is no runtime
  int (*thread_number)() = nullptr;
  int (*in_parallel)() = nullptr;
  int (*max_threads)() = nullptr;
  void (*set_num_threads)(int) = nullptr;
};

#ifdef _WIN32
void* symbol(void* scope, const char* name) {
  return reinterpret_cast<void*>(GetProcAddress(static_cast<HMODULE>(scope), name));
}

std::string file_of(void* address) {
  HMODULE module = nullptr;
  GetModuleHandleExA(GET_MODULE_HANDLE_EX_FLAG_FROM_ADDRESS, static_cast<const char*>(address),
                     &module);
  char file[MAX_PATH] = "";
  GetModuleFileNameA(module, file, sizeof(file));
  return file;
}

std::vector<void*> scopes() {
  std::vector<void*> found;
  for (const char* name : {"libiomp5md.dll", "libomp140.x86_64.dll"}) {
    if (void* const module = GetModuleHandleA(name)) found.push_back(module);
  }
  return found;
}
#else
void* symbol(void* scope, const char* name) { return dlsym(scope, name); }

std::string file_of(void* address) {
  Dl_info info;
  return dladdr(address, &info) ? info.dli_fname : "";
}

// Where the dynamic linker finds the OpenMP functions that torch calls: on Linux the global scope,
// then the libraries that torch depends on; on macOS those libraries first.
std::vector<void*> scopes() {
#ifdef __APPLE__
  constexpr const char* kNames[] = {"@rpath/libtorch_cpu.dylib"};
#else
  // The torch of a Linux distribution has its version in its name. GCC compiles it.
  constexpr const char* kNames[] = {"libtorch_cpu.so", "libgomp.so.1"};
#endif
  std::vector<void*> found{RTLD_DEFAULT};
  for (const char* const name : kNames) {
    if (void* const library = dlopen(name, RTLD_LAZY | RTLD_NOLOAD)) found.push_back(library);
  }
#ifdef __APPLE__
  std::swap(found.front(), found.back());
#endif
  return found;
}
#endif

template <class Function> bool find(void* scope, const char* name, Function& function) {
  function = reinterpret_cast<Function>(symbol(scope, name));
  return function != nullptr;
}

// The runtimes of Intel and LLVM also have GOMP_parallel, except on Windows and perhaps on macOS.
// There, the functions that Clang calls are used.
struct Location {
  int32_t reserved, flags, reserved_2, reserved_3;
  const char* source;
};
using Task = void (*)(int32_t* thread, int32_t* number, ...);
void (*kmpc_fork_call)(Location*, int32_t arguments, Task task, ...);

void kmpc_task(int32_t*, int32_t*, void (**body)(void*), void* data) { (*body)(data); }

void kmpc_parallel(void (*body)(void*), void* data, unsigned, unsigned) {
  static Location location{0, 2, 0, 0, ";unknown;unknown;0;0;;"};  // 2: made by a compiler
  kmpc_fork_call(&location, 2, reinterpret_cast<Task>(kmpc_task), &body, data);
}

Runtime find_runtime() noexcept {
  for (void* const scope : scopes()) {
    Runtime found;
    if (!find(scope, "omp_get_thread_num", found.thread_number) ||
        !find(scope, "omp_in_parallel", found.in_parallel) ||
        !find(scope, "omp_get_max_threads", found.max_threads) ||
        !find(scope, "omp_set_num_threads", found.set_num_threads)) {
      continue;
    }
    found.file = file_of(reinterpret_cast<void*>(found.in_parallel));
    if (find(scope, "GOMP_parallel", found.parallel)) return found;
    found.parallel = &kmpc_parallel;
    if (find(scope, "__kmpc_fork_call", kmpc_fork_call)) return found;
  }
  return {};
}

const Runtime runtime = find_runtime();

// ---- blocks on threads --------------------------------------------------------------------------

// The blocks assigned to a thread, from which other threads steal. Aligned against false sharing.
struct alignas(64) Queue {
  std::atomic<int64_t> next;
  int64_t end;
};

// A thread takes a 32nd of a queue at a time, because an atomic operation waits for the stores
// before it, and non-temporal stores are slow. One block at a time takes 1.07 times as long at (8,
// 21, 256, 256), and schedule(dynamic), which spreads neighbouring blocks over threads, 1.2 times.
constexpr int64_t kSteps = 32;

// The rounding mode of a thread and its handling of subnormal numbers.
#ifdef __SSE2__
constexpr unsigned kFlushToZero = 0x8000;
unsigned float_control() { return _mm_getcsr(); }
void set_float_control(unsigned control) { _mm_setcsr(control); }
#else
constexpr unsigned kFlushToZero = 0;
unsigned float_control() { return 0; }
void set_float_control(unsigned) {}
#endif

thread_local unsigned flushes = 0;  // the bits that FlushSubnormals has set in this thread

struct Work {
  std::vector<Queue> queues;
  int64_t step;
  Blocks body;
  const void* data;
  char* memory;  // all threads' memory, the first thread's first
  size_t bytes;  // per thread
  unsigned control = float_control(), callers_control = control & ~flushes;
};

void run_queues(void* shared) {
  Work& work = *static_cast<Work*>(shared);
  const size_t threads = work.queues.size(), thread = size_t(runtime.thread_number());
  if (thread >= threads) return;
  const unsigned previous = float_control();
  set_float_control(work.control);
  for (size_t i = 0; i < threads; ++i) {
    Queue& queue = work.queues[(thread + i) % threads];
    while (queue.next.load(std::memory_order_relaxed) < queue.end) {
      const int64_t first = queue.next.fetch_add(work.step, std::memory_order_relaxed);
      const int64_t end = std::min(queue.end, first + work.step);
      if (first < end) work.body(work.data, first, end, work.memory + thread * work.bytes);
    }
  }
  set_float_control(previous);
}

// The team always has the number of threads that torch has set: libgomp ends the threads that a
// smaller team leaves out, and torch's next operator would have to start them again.
//
// A thread that the runtime starts inherits the control of its creator: in threads that inherited
// FlushSubnormals, torch's operators would also flush subnormal numbers.
void run_team(Work& work) {
  const unsigned previous = float_control();
  set_float_control(work.callers_control);
  runtime.parallel(&run_queues, &work, 0, 0);
  set_float_control(previous);
}

// ---- memory of threads --------------------------------------------------------------------------

// The calling thread keeps the memory for its next call, where the memory may still be in the
// cache. An allocation of this size may get new pages each time.
class Memory {
 public:
  Memory() = default;
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { ::operator delete(data, kAlignment); }

  char* at_least(size_t needed) {
    if (bytes < needed) {
      ::operator delete(std::exchange(data, nullptr), kAlignment);
      bytes = 0;
      data = ::operator new(needed, kAlignment);
      bytes = needed;
    }
    return static_cast<char*>(data);
  }

 private:
  static constexpr std::align_val_t kAlignment{kVectorBytes};
  void* data = nullptr;
  size_t bytes = 0;
};

thread_local Memory memory;

// ---- measurements -------------------------------------------------------------------------------

// Off by default, because reading a clock may take as long as a small kernel.
std::atomic<bool> measures{false};
std::atomic<int64_t> regions{0}, nanoseconds{0};

int64_t now() {
  const auto time = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(time).count();
}

// ---- fork ---------------------------------------------------------------------------------------

thread_local bool forked = false;  // whether this is the thread that a fork left in the child
#ifndef _WIN32
const int fork_watch = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

// Work stealing: each thread runs its own queue and then the rest of the others' queues, so that no
// thread waits for one that the operating system has suspended. On two cores with another busy
// process, calls of some milliseconds are 1.1 to 1.25 times as fast as with schedule(static);
// alone, 1 to 1.05 times.
void run_on_threads(int64_t blocks, int threads, Blocks body, const void* data, size_t bytes) {
  if (threads > blocks) threads = int(blocks);
  if (threads <= 1 || !runtime.parallel || runtime.in_parallel()) {
    return body(data, 0, blocks, memory.at_least(bytes));
  }
  const int64_t step = std::max<int64_t>(1, blocks / (kSteps * threads));
  Work work{std::vector<Queue>(threads), step, body, data, memory.at_least(threads * bytes), bytes};
  for (int i = 0; i < threads; ++i) {
    work.queues[i].next = blocks * i / threads;
    work.queues[i].end = blocks * (i + 1) / threads;
  }
  regions.fetch_add(1, std::memory_order_relaxed);
  // OpenMP's threads do not survive a fork: if the thread that forked had a team, it would wait for
  // that team forever in the child, and no runtime reports whether it had one. A new thread gets a
  // new team, and both end with the call: threads that stayed could have the handles of the
  // parent's threads, which torch joins at exit.
  if (!forked) return run_team(work);
  std::thread([&] {
    runtime.set_num_threads(threads);  // a new thread does not inherit torch's number
    run_team(work);
  }).join();
}

}  // namespace

void run_blocks(int64_t blocks, int threads, Blocks body, const void* data, size_t bytes) {
  const bool measured = blocks > 1 && measures.load(std::memory_order_relaxed);
  const int64_t started = measured ? now() : 0;
  run_on_threads(blocks, threads, body, data, bytes);
  if (measured) nanoseconds.fetch_add(now() - started, std::memory_order_relaxed);
}

void run_on_one_thread(void (*body)(void*), void* data) {
  if (!runtime.parallel || forked) return body(data);
  auto call = std::pair{body, data};
  const auto run = [](void* call) {
    const auto [body, data] = *static_cast<std::pair<void (*)(void*), void*>*>(call);
    if (runtime.thread_number() == 0) body(data);
  };
  runtime.parallel(run, &call, 0, 0);
}

void measure_regions(bool enabled) {
  measures = enabled;
  regions = nanoseconds = 0;
}

Regions measured_regions() { return {regions, double(nanoseconds) * 1e-9}; }

FlushSubnormals::FlushSubnormals() : previous(float_control()) {
  flushes |= kFlushToZero & ~previous;
  set_float_control(previous | kFlushToZero);
}
FlushSubnormals::~FlushSubnormals() {
  flushes &= previous;
  set_float_control(previous);
}

std::string runtime_file() { return runtime.file; }
int runtime_threads() { return runtime.max_threads ? runtime.max_threads() : 1; }

}  // namespace pyfused
