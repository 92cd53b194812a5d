#include "activation.h"

namespace pyfused {

#include "formulas_checksum.inc"

uint32_t formulas_checksum() { return kFormulasChecksum; }

}  // namespace pyfused
