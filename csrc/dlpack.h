// Recycled memory as a tensor: the little of DLPack (dmlc.github.io/dlpack, version 0) that this
// takes.
#pragma once

#include <cstdint>
#include <vector>

#include "recycle.h"

namespace pyfused {

struct DLDataType {
  uint8_t code, bits;  // code: 2 IEEE float, 4 bfloat
  uint16_t lanes;
};

struct DLTensor {
  void* data;
  struct {
    int32_t type, id;  // type: 1 CPU
  } device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct DLManagedTensor {
  DLTensor tensor;
  void* context;
  void (*deleter)(DLManagedTensor*);
};

#ifdef PYFUSED_RECYCLES
// A tensor in a block that goes back to where it came from, with whichever thread drops it last.
struct RecycledTensor {
  DLManagedTensor managed;
  std::vector<int64_t> shape, strides;
  Block block;

  // Null where there is no block to be had.
  static DLManagedTensor* make(size_t bytes, DLDataType dtype, std::vector<int64_t> shape,
                               std::vector<int64_t> strides) {
    const Block block = Recycler::get().take(bytes);
    if (!block.data) return nullptr;
    auto* made = new RecycledTensor{{}, std::move(shape), std::move(strides), block};
    made->managed.tensor = {
        block.data,           {1, 0}, int32_t(made->shape.size()), dtype, made->shape.data(),
        made->strides.data(), 0};
    made->managed.context = made;
    made->managed.deleter = [](DLManagedTensor* managed) {
      auto* self = static_cast<RecycledTensor*>(managed->context);
      Recycler::get().give(self->block);
      delete self;
    };
    return &made->managed;
  }
};
#endif

}  // namespace pyfused
