// CUDA for a CPU, so that csrc/*/cuda*.cu can be compiled as C++ (-DML_EMULATED) and their numbers be checked without a
// GPU. Formats, their conversions and the runtime's types come from the CUDA toolkit's headers, which know the host.
//
// Blocks run one after another. The threads of a block are fibers: one runs until it comes to a barrier or a shuffle,
// then the next one of its warp runs, and the next warp when all of this one wait for the block: so far apart can warps
// be on a GPU. Which is next is set by ml_emulation_order, so that a missing barrier shows as a number that is wrong in
// one order. Before each block shared memory is filled with NaN. A barrier that not all threads come to, or
// one that they come to on different lines, ends the process with a message.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <cuda_runtime_api.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <algorithm>
#include <source_location>
#include <tuple>
#include <type_traits>

// Shared memory is the thread-local storage of the one host thread that plays all threads of a block: that storage is
// one piece, which can be filled with NaN whatever variables are in it.
#undef __shared__
#define __shared__ static thread_local
#undef __forceinline__
#define __forceinline__ inline
#undef __launch_bounds__
#define __launch_bounds__(...)

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace ml {
namespace emulated {

using Here = std::source_location;

[[noreturn]] void fail(const char* message, Here here);

// Number of the running thread in its block, from 0.
int thread_number();

// Every thread of the block comes here; then all go on.
void block_barrier(Here here);

// All lanes of the warp come here, each with its `data`; the last one calls `function` with the 32 pointers, null for
// lanes that a block of fewer threads lacks; then all go on.
void warp_collective(void* data, void (*function)(void* const* lanes, void* context), void* context, Here here);

// The same for typed data: function(Data* const (&lanes)[32]) runs once, and sees what all lanes deposited.
//
//   struct Lane { float in, out; } lane{v, 0};
//   warp_collective(lane, [](auto& lanes) { for (int i = 0; i < 32; ++i) lanes[i]->out = lanes[31 - i]->in; });
//   return lane.out;
template <class Data, class Function>
void warp_collective(Data& data, Function function, Here here = Here::current()) {
  const auto call = [](void* const* lanes, void* context) {
    Data* typed[32];
    for (int lane = 0; lane < 32; ++lane) typed[lane] = static_cast<Data*>(lanes[lane]);
    Data* const(&all)[32] = typed;
    (*static_cast<Function*>(context))(all);
  };
  warp_collective(&data, call, &function, here);
}

// Runs body(arguments) once for each thread of the grid.
cudaError_t run_grid(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*), void* arguments);

unsigned char* dynamic_shared_memory();

template <class T>
T shuffle(unsigned mask, T value, int source_lane, Here here) {
  if (mask != 0xffffffffu) fail("a shuffle without the full mask", here);
  struct Lane {
    T in, out;
    int source;
  } lane{value, value, source_lane};
  warp_collective(lane, [here](auto& lanes) {
    for (auto* one : lanes) {
      if (one == nullptr) continue;
      if (lanes[one->source] == nullptr) fail("a shuffle from a lane that is not there", here);
      one->out = lanes[one->source]->in;
    }
  }, here);
  return lane.out;
}

inline int lane_number() { return thread_number() % 32; }

}  // namespace emulated

// As in common/cuda.cuh.
template <class... Parameters, class... Arguments>
cudaError_t start(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
                  Arguments... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> parameters;
  } call{kernel, std::tuple<Parameters...>(static_cast<Parameters>(arguments)...)};
  const auto body = [](void* pointer) {
    auto* own = static_cast<Call*>(pointer);
    std::apply(own->kernel, own->parameters);
  };
  return emulated::run_grid(grid, block, shared_bytes, body, &call);
}

template <class T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(emulated::dynamic_shared_memory());
}

}  // namespace ml

// ---- barriers, shuffles, votes

inline void __syncthreads(ml::emulated::Here here = ml::emulated::Here::current()) {
  ml::emulated::block_barrier(here);
}

inline void __syncwarp(unsigned mask = 0xffffffffu, ml::emulated::Here here = ml::emulated::Here::current()) {
  if (mask != 0xffffffffu) ml::emulated::fail("__syncwarp without the full mask", here);
  int nothing = 0;
  ml::emulated::warp_collective(nothing, [](auto&) {}, here);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              ml::emulated::Here here = ml::emulated::Here::current()) {
  const int lane = ml::emulated::lane_number();
  return ml::emulated::shuffle(mask, value, lane / width * width + (source & (width - 1)), here);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32,
                  ml::emulated::Here here = ml::emulated::Here::current()) {
  const int lane = ml::emulated::lane_number(), source = lane ^ bits;
  return ml::emulated::shuffle(mask, value, source / width > lane / width ? lane : source, here);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32,
                   ml::emulated::Here here = ml::emulated::Here::current()) {
  const int lane = ml::emulated::lane_number(), source = lane + static_cast<int>(distance);
  return ml::emulated::shuffle(mask, value, source / width == lane / width ? source : lane, here);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32,
                 ml::emulated::Here here = ml::emulated::Here::current()) {
  const int lane = ml::emulated::lane_number(), source = lane - static_cast<int>(distance);
  return ml::emulated::shuffle(mask, value, source >= lane / width * width ? source : lane, here);
}

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              ml::emulated::Here here = ml::emulated::Here::current()) {
  if (mask != 0xffffffffu) ml::emulated::fail("a vote without the full mask", here);
  struct Lane {
    bool votes;
    unsigned result;
  } lane{predicate != 0, 0};
  ml::emulated::warp_collective(lane, [](auto& lanes) {
    unsigned result = 0;
    for (int i = 0; i < 32; ++i) result |= lanes[i] != nullptr && lanes[i]->votes ? 1u << i : 0u;
    for (auto* one : lanes)
      if (one != nullptr) one->result = result;
  }, here);
  return lane.result;
}
inline int __any_sync(unsigned mask, int predicate, ml::emulated::Here here = ml::emulated::Here::current()) {
  return __ballot_sync(mask, predicate, here) != 0;
}
inline int __all_sync(unsigned mask, int predicate, ml::emulated::Here here = ml::emulated::Here::current()) {
  return __ballot_sync(mask, !predicate, here) == 0;
}

inline void __threadfence() {}
inline void __threadfence_block() {}

// ---- atomics: one thread runs at a time

template <class T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  const T before = *address;
  *address = before + value;
  return before;
}
template <class T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  const T before = *address;
  *address = std::max(before, value);
  return before;
}
template <class T>
T atomicExch(T* address, std::type_identity_t<T> value) {
  const T before = *address;
  *address = value;
  return before;
}
template <class T>
T atomicOr(T* address, std::type_identity_t<T> value) {
  const T before = *address;
  *address = before | value;
  return before;
}

// ---- loads and stores with hints

template <class T> T __ldg(const T* address) { return *address; }
template <class T> T __ldcs(const T* address) { return *address; }
template <class T> T __ldcg(const T* address) { return *address; }
template <class T> void __stcs(T* address, std::type_identity_t<T> value) { *address = value; }
template <class T> void __stcg(T* address, std::type_identity_t<T> value) { *address = value; }

// ---- arithmetic. The fast functions of a GPU (__expf) are right to some units; here they are right to one.

template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }

inline float rsqrtf(float x) { return static_cast<float>(1.0 / sqrt(static_cast<double>(x))); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float __saturatef(float x) { return fminf(fmaxf(x, 0.0f), 1.0f); }
inline int __float2int_rn(float x) { return static_cast<int>(nearbyintf(x)); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }

template <class To, class From>
To ml_emulated_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}
inline unsigned __float_as_uint(float x) { return ml_emulated_bits<unsigned>(x); }
inline int __float_as_int(float x) { return ml_emulated_bits<int>(x); }
inline float __uint_as_float(unsigned x) { return ml_emulated_bits<float>(x); }
inline float __int_as_float(int x) { return ml_emulated_bits<float>(x); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(unsigned x) { return x == 0 ? 32 : __builtin_clz(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
