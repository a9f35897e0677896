// What the library tells of itself.

#include "common/instruction_set.h"
#include "common/tensors.h"

STABLE_TORCH_LIBRARY_FRAGMENT(megatron_lite_cpu, m) {
  m.def("instruction_set(int requested=-1) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(megatron_lite_cpu, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&ml::instruction_set));
}
