// Functions for test_parallel.py that report which threads run the blocks of csrc/parallel.cpp.
#include "parallel.h"

#include <atomic>
#include <chrono>
#include <mutex>
#include <new>
#include <set>
#include <thread>

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED int threads_used(int64_t blocks, int threads) {
  std::mutex mutex;
  std::set<std::thread::id> seen;
  pyfused::parallel_for<pyfused::NoBuffers>(blocks, threads, [&](int64_t, auto) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));  // so that each thread gets blocks
    const std::lock_guard<std::mutex> hold(mutex);
    seen.insert(std::this_thread::get_id());
  });
  return int(seen.size());
}

template <size_t bytes> int count_blocks(int64_t blocks, int threads) {
  struct Buffers {
    char data[bytes];
  };
  std::atomic<int> count{0};
  try {
    pyfused::parallel_for<Buffers>(blocks, threads, [&](int64_t, auto workspace) {
      workspace.make().data[bytes - 1] = 1;
      ++count;
    });
  } catch (const std::bad_alloc&) {
    return count ? -2 : -1;
  }
  return count;
}

// Returns how many blocks ran, or -1 because 2^59 bytes for each thread could not be allocated.
EXPORTED int blocks_run(int64_t blocks, int threads, int huge) {
  return huge ? count_blocks<size_t(1) << 59>(blocks, threads)
              : count_blocks<1000>(blocks, threads);
}

EXPORTED int has_runtime() { return !pyfused::runtime_file().empty(); }
