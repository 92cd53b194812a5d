// Cross-entropy of a batch. The arguments and the equations are in cross_entropy_terms.h.
#pragma once

#include <array>

#include "cross_entropy_terms.h"

namespace pyfused {

// Returns the first position whose target is out of range, with nothing written, or -1.
template <class T> int64_t cross_entropy(const CrossEntropy<T>& ce);

// The fewest contiguous classes for the row layout, for float, double, bfloat16 and float16.
std::array<int64_t, 4> row_classes();

}  // namespace pyfused
