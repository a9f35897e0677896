// Not emulated: launches that no GPU takes. Prints the error code of each, for test_cuda_kernels.py.

#include <stdio.h>

#include "common/cuda.cuh"

namespace {

__global__ void nothing() {}

}  // namespace

int main() {
  printf("%d\n", ml::launch(nothing, 0, 32, 0, nullptr));
  printf("%d\n", ml::launch(nothing, (int64_t(1) << 32) + 1, 32, 0, nullptr));
  printf("%d\n", ml::launch(nothing, {1, 65536}, 32, 0, nullptr));
  printf("%d\n", ml::launch(nothing, 1, 2048, 0, nullptr));
  printf("%d\n", ml::launch(nothing, 1, 32, 1 << 20, nullptr));
}
