// Which outputs of a map on the CPU are written by streaming stores.
#pragma once

#include "kernels.h"

namespace genkern {

// Bit j: output j. Decides nothing but time.
uint32_t streamed_outputs(const MapArgs& args);

}  // namespace genkern
