// A pool of large blocks of memory for outputs.
//
// Linux zeroes each new page, which takes longer than most kernels here take to fill it. So a freed
// block stays mapped, marked with MADV_FREE: Linux reclaims its pages under memory pressure;
// otherwise the next output of about that size reuses them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

#ifdef __linux__
#include <pthread.h>
#include <sys/mman.h>
#include <sys/resource.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, bytes)
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes)
#endif

namespace pyfused {

struct Block {
  void* data;
  size_t bytes;
};

#if defined(__linux__) && defined(MADV_FREE)
#define PYFUSED_RECYCLES 1

class Recycler {
 public:
  // A huge page. The size of a block is a multiple of it.
  static constexpr size_t kPage = size_t(1) << 21;

  struct Stats {
    size_t in_use = 0, free = 0;  // bytes
    uint64_t hits = 0, misses = 0;
  };

  // Returns a block, whose data is null if there is no memory or the limit is 0.
  Block take(size_t bytes) {
    bytes = (bytes + kPage - 1) / kPage * kPage;
    if (Block block = reuse(bytes); block.data || !limit()) return block;
    void* data = map(bytes);
    if (!data && release(0)) data = map(bytes);
    const std::lock_guard<std::mutex> hold(mutex);
    stats_.misses += 1;
    if (data) stats_.in_use += bytes;
    return {data, bytes};
  }

  void give(Block block) {
    // A limit of the address space (RLIMIT_AS) includes free blocks, so none are kept then.
    rlimit space;
    const bool counted = getrlimit(RLIMIT_AS, &space) || space.rlim_cur != RLIM_INFINITY;
    const bool keep =
        !counted && block.bytes <= limit() && madvise(block.data, block.bytes, MADV_FREE) == 0;
    if (keep) {
      ASAN_POISON_MEMORY_REGION(block.data, block.bytes);
    }
    {
      const std::lock_guard<std::mutex> hold(mutex);
      stats_.in_use -= block.bytes;
      if (keep) {
        blocks.push_back(block);
        stats_.free += block.bytes;
      }
    }
    if (!keep) munmap(block.data, block.bytes);
    release(limit());
  }

  // Unmaps the oldest free blocks until at most `left` bytes are free. Returns the bytes unmapped.
  size_t release(size_t left) {
    std::vector<Block> gone;
    {
      const std::lock_guard<std::mutex> hold(mutex);
      size_t first = 0;
      for (; stats_.free > left; ++first) stats_.free -= blocks[first].bytes;
      gone.assign(blocks.begin(), blocks.begin() + first);
      blocks.erase(blocks.begin(), blocks.begin() + first);
    }
    size_t bytes = 0;
    for (const Block& block : gone) {
      ASAN_UNPOISON_MEMORY_REGION(block.data, block.bytes);
      munmap(block.data, block.bytes);
      bytes += block.bytes;
    }
    return bytes;
  }

  // The most bytes of free blocks; 0 switches the pool off.
  void set_limit(size_t bytes) {
    {
      const std::lock_guard<std::mutex> hold(mutex);
      limit_ = bytes;
    }
    release(bytes);
  }

  size_t limit() {
    const std::lock_guard<std::mutex> hold(mutex);
    return limit_;
  }

  Stats stats() {
    const std::lock_guard<std::mutex> hold(mutex);
    return stats_;
  }

  // Never destroyed: tensors may outlive the interpreter.
  static Recycler& get() {
    static Recycler* const recycler = [] {
      // A child process starts without free blocks.
      pthread_atfork([] { get().mutex.lock(); }, [] { get().mutex.unlock(); },
                     [] {
                       get().mutex.unlock();
                       get().release(0);
                     });
      return new Recycler;
    }();
    return *recycler;
  }

 private:
  Block reuse(size_t bytes) {
    const std::lock_guard<std::mutex> hold(mutex);
    size_t best = blocks.size();
    for (size_t i = 0; i < blocks.size(); ++i) {
      const size_t size = blocks[i].bytes;
      const bool fits = size >= bytes && size - bytes <= bytes / 8;
      if (fits && (best == blocks.size() || size <= blocks[best].bytes)) best = i;
    }
    if (best == blocks.size()) return {nullptr, 0};
    const Block block = blocks[best];
    blocks.erase(blocks.begin() + best);
    stats_.hits += 1;
    stats_.free -= block.bytes;
    stats_.in_use += block.bytes;
    ASAN_UNPOISON_MEMORY_REGION(block.data, block.bytes);
    return block;
  }

  static void* map(size_t bytes) {
    void* const start =
        mmap(nullptr, bytes + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED) return nullptr;
    char* const from = static_cast<char*>(start);
    const size_t before = size_t(-reinterpret_cast<uintptr_t>(start)) % kPage;
    if (before) munmap(from, before);
    munmap(from + before + bytes, kPage - before);
    madvise(from + before, bytes, MADV_HUGEPAGE);  // a hint
    return from + before;
  }

  std::mutex mutex;
  std::vector<Block> blocks;  // free ones, the oldest first
  Stats stats_;
  size_t limit_ = 0;
};
#endif

}  // namespace pyfused
