// Flash attention on the CPU with fp32 products, for every storage format: bf16 and fp16 become fp32 when packed.

#include "attention/cpu_table.h"

namespace ml {
extern const AttentionCpus ML_FOR_ISA(attention) = {
    Table<Fp32Words, Fp32>::functions, Table<Fp32Words, Bf16>::functions, Table<Fp32Words, Fp16>::functions};
}
