#include "nll_loss.h"

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "memory.h"
#include "parallel.h"
#include "target_statistics.h"

namespace pyfused {

// Writes zeros, with non-temporal stores if they exceed the cache.
template <class T> void clear(T* data, int64_t n, int threads) {
  constexpr int64_t kBlock = 1 << 16;
  const size_t bytes = size_t(n) * sizeof(T);
  [[maybe_unused]] const bool streams = bytes >= kStreamBytes && has_pages(data, bytes);
  parallel_for((n + kBlock - 1) / kBlock, threads, [=](int64_t block) {
    const int64_t first = block * kBlock, end = std::min(n, first + kBlock);
#ifdef __SSE2__
    alignas(kVectorBytes) static constexpr T zeros[kWriteElements] = {};
    for (int64_t i = first; streams && i < end; i += kWriteElements) {
      stream(zeros, data + i, std::min(kWriteElements, end - i));
    }
    if (streams) return;
#endif
    std::memset(data + first, 0, size_t(end - first) * sizeof(T));
  });
}

// A sum of floats in double, which needs no compensation within a block.
struct BlockSum {
  double sum = 0;
  void add(double x) { sum += x; }
  double value() const { return sum; }
};

template <class T> int64_t nll_loss(const CrossEntropy<T>& nll) {
  using A = Accumulate<T>;
  const TargetStatistics statistics = target_statistics(nll);
  if (statistics.out_of_range >= 0) return statistics.out_of_range;
  const bool mean = nll.reduction == Reduction::mean, each = nll.reduction == Reduction::none;
  const CrossEntropyBatch<T> batch(nll, 0, mean ? statistics.denominator : 1, false);
  if (nll.grad_logits.data) {
    clear(nll.grad_logits.data, nll.positions() * nll.classes, nll.threads);
  }
  constexpr int64_t kBlock = 1024;
  const int64_t blocks = (nll.positions() + kBlock - 1) / kBlock;
  std::vector<double> partial(blocks);
  parallel_for(blocks, nll.threads, [&](int64_t block) {
    std::conditional_t<std::is_same_v<A, double>, Sum, BlockSum> sum;
    const int64_t end = std::min(nll.positions(), (block + 1) * kBlock);
    for (int64_t position = block * kBlock; position < end; ++position) {
      const bool ignored = nll.ignored(position);
      const int64_t label = ignored ? 0 : nll.target[position];
      const double weight = ignored ? 0 : nll.weight ? double(nll.weight[label]) : 1;
      if (nll.loss) {
        const T* const x = nll.at(nll.logits, position) + label * nll.logits.classes;
        const double loss = ignored ? 0 : -weight * double(widen(*x));
        if (each) nll.loss[position] = A(loss);
        sum.add(loss);
      }
      if (nll.grad_logits.data && !ignored) {
        T* const gradient = nll.at(nll.grad_logits, position) + label * nll.grad_logits.classes;
        *gradient = narrow<T>(A(-weight * batch.row_scale(position)));
      }
    }
    partial[block] = sum.value();
  });
  if (nll.loss && !each) *nll.loss = A(total<T>(partial.data(), blocks) / batch.denominator);
  return -1;
}

template int64_t nll_loss(const CrossEntropy<float>&);
template int64_t nll_loss(const CrossEntropy<double>&);
template int64_t nll_loss(const CrossEntropy<bfloat16>&);
template int64_t nll_loss(const CrossEntropy<float16>&);

}  // namespace pyfused
