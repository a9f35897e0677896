// The same code once more, for a CPU that converts to bf16 in one instruction.
#include "swiglu/cpu.cpp"
