// How a kernel's numbers are stored. Arithmetic is fp32 in all of them.
#pragma once

#include <stdint.h>

namespace ml {

enum class Format : int { kFp32, kBf16, kFp16 };

}  // namespace ml
