// What common/norm_launch.cuh decides about a row, for test_norm_kernels.py.

#include "common/norm_launch.cuh"

// Numbers that one access moves, of a row of `dim` numbers of 4 or 2 bytes.
extern "C" __attribute__((visibility("default"))) int numbers_an_access(int bytes, int64_t dim, bool aligned) {
  return (bytes == 4 ? ml::spread_of<float>(dim, aligned) : ml::spread_of<__nv_bfloat16>(dim, aligned)).size;
}

// Whether the row stays in registers, so that it is read once.
extern "C" __attribute__((visibility("default"))) bool is_read_once(int bytes, int64_t dim, bool aligned) {
  return (bytes == 4 ? ml::spread_of<float>(dim, aligned) : ml::spread_of<__nv_bfloat16>(dim, aligned)).packs > 0;
}
