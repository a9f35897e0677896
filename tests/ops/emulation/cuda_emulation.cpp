// The fibers of cuda_emulation.h, and the functions of CUDA's runtime that the kernels' launchers call.
//
// A fiber is made once and then plays a thread of one block after another. ucontext gives it its stack; after that
// _setjmp and _longjmp switch, which make no system call.

#include "cuda_emulation.h"

#include <link.h>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace ml::emulated {
namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kMaxSharedBytes = 163 * 1024;  // of a block on sm_80
constexpr size_t kGuardBytes = 1024;
constexpr unsigned char kPoison = 0xff;  // NaN in fp32, bf16 and fp16, -1 in integers
constexpr int kMaxThreads = 1024;

enum class State { kReady, kAtBlockBarrier, kAtWarp, kEnded };

struct Fiber {
  State state = State::kEnded;
  uint3 index{};
  Here here;
  void* data = nullptr;
  jmp_buf context;
  ucontext_t start;
};

struct Warp {
  void* lanes[32];
  int arrived, size;
};

// The machine: one grid runs at a time. Fibers stay for the next grid.
struct Machine {
  std::mutex mutex;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<int> order;
  std::vector<Warp> warps;
  alignas(128) unsigned char dynamic[kMaxSharedBytes + kGuardBytes];
  size_t dynamic_bytes = 0;
  unsigned char* static_shared = nullptr;
  size_t static_bytes = 0;
  jmp_buf scheduler;
  int running = 0, num_threads = 0, at_barrier = 0, num_ended = 0;
  int order_seed = 0;
  size_t max_shared_bytes = kMaxSharedBytes;
  int launches_to_refusal = -1;
  void (*body)(void*) = nullptr;
  void* arguments = nullptr;
};

Machine& machine() {
  static Machine* one = new Machine;  // never deleted: stacks of fibers point into it
  return *one;
}

thread_local unsigned char tls_anchor = 0;  // makes the loader give this library its thread-local storage

// Finds the thread-local storage of this library for this host thread, that is: all __shared__ variables.
void find_static_shared() {
  asm volatile("" ::"r"(&tls_anchor) : "memory");
  const auto look = [](dl_phdr_info* info, size_t, void* anchor) {
    for (int i = 0; i < info->dlpi_phnum; ++i) {
      const auto& part = info->dlpi_phdr[i];
      auto* begin = static_cast<unsigned char*>(info->dlpi_tls_data);
      if (part.p_type != PT_TLS || begin == nullptr || anchor < begin || anchor >= begin + part.p_memsz) continue;
      machine().static_shared = begin;
      machine().static_bytes = part.p_memsz;
      return 1;
    }
    return 0;
  };
  if (dl_iterate_phdr(look, &tls_anchor) == 0) fail("the shared memory is not to be found", Here::current());
}

// Gives control back to the scheduler; returns when the scheduler lets this thread go on.
__attribute__((noinline)) void stop_running(Fiber& fiber) {
  if (_setjmp(fiber.context) == 0) _longjmp(machine().scheduler, 1);
}

void fiber_main() {
  for (;;) {
    auto& m = machine();
    Fiber& fiber = *m.fibers[m.running];
    m.body(m.arguments);
    fiber.state = State::kEnded;
    ++m.num_ended;
    stop_running(fiber);
  }
}

void make_fibers(size_t count) {
  auto& fibers = machine().fibers;
  while (fibers.size() < count) {
    auto fiber = std::make_unique<Fiber>();
    void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) fail("no memory for the stack of a thread", Here::current());
    mprotect(stack, 4096, PROT_NONE);
    getcontext(&fiber->start);
    fiber->start.uc_stack = {stack, 0, kStackBytes};
    fiber->start.uc_link = nullptr;
    makecontext(&fiber->start, fiber_main, 0);
    fibers.push_back(std::move(fiber));
  }
}

__attribute__((noinline)) void resume(int number) {
  auto& m = machine();
  Fiber& fiber = *m.fibers[number];
  m.running = number;
  threadIdx = fiber.index;
  if (_setjmp(m.scheduler) != 0) return;
  if (fiber.start.uc_stack.ss_sp != nullptr) {
    fiber.start.uc_stack.ss_sp = nullptr;  // it has begun
    setcontext(&fiber.start);
  }
  _longjmp(fiber.context, 1);
}

void report_deadlock() {
  auto& m = machine();
  int ended = -1;
  for (int i = 0; i < m.num_threads; ++i)
    if (m.fibers[i]->state == State::kEnded) ended = i;
  for (int i = 0; i < m.num_threads; ++i) {
    const Fiber& fiber = *m.fibers[i];
    if (fiber.state == State::kEnded) continue;
    if (ended >= 0) fprintf(stderr, "thread %d has ended, and thread %d waits for all\n", ended, i);
    fail(fiber.state == State::kAtWarp ? "lanes of the warp do not come here" : "threads do not come to this barrier",
         fiber.here);
  }
}

void run_block() {
  auto& m = machine();
  m.at_barrier = m.num_ended = 0;
  const int size = m.num_threads;
  for (size_t w = 0; w < m.warps.size(); ++w)
    m.warps[w] = {{}, 0, std::min(32, size - static_cast<int>(w) * 32)};
  for (int i = 0; i < size; ++i) m.fibers[i]->state = State::kReady;
  memset(m.static_shared, kPoison, m.static_bytes);
  memset(m.dynamic, kPoison, m.dynamic_bytes + kGuardBytes);
  while (m.num_ended < size) {
    bool has_moved = false;
    for (int begin = 0, end; begin < size; begin = end) {
      end = begin + m.warps[m.order[begin] / 32].size;
      for (bool moves = true; moves;) {  // until all of the warp wait for the block, or have ended
        moves = false;
        for (int i = begin; i < end; ++i) {
          if (m.fibers[m.order[i]]->state != State::kReady) continue;
          moves = has_moved = true;
          resume(m.order[i]);
        }
      }
    }
    if (!has_moved) report_deadlock();
  }
  for (size_t i = 0; i < kGuardBytes; ++i)
    if (m.dynamic[m.dynamic_bytes + i] != kPoison) fail("a write behind the dynamic shared memory", Here::current());
}

// Order 0: threads run from the first to the last; 1: from the last to the first; others: shuffled by that seed, warps
// and the lanes of each. The lanes of a warp stay together.
void set_order(int num_threads) {
  auto& m = machine();
  m.order.resize(num_threads);
  std::iota(m.order.begin(), m.order.end(), 0);
  if (m.order_seed == 1) std::reverse(m.order.begin(), m.order.end());
  if (m.order_seed <= 1) return;
  std::mt19937 random(m.order_seed);
  std::vector<int> place(m.warps.size());
  std::iota(place.begin(), place.end(), 0);
  std::shuffle(place.begin(), place.end(), random);
  std::shuffle(m.order.begin(), m.order.end(), random);
  std::stable_sort(m.order.begin(), m.order.end(), [&](int a, int b) { return place[a / 32] < place[b / 32]; });
}

void check_same_place(const Fiber& fiber, Here here) {
  if (fiber.here.line() == here.line() && !strcmp(fiber.here.file_name(), here.file_name())) return;
  fprintf(stderr, "%s:%d: one thread waits here\n", fiber.here.file_name(), static_cast<int>(fiber.here.line()));
  fail("and another one here", here);
}

bool is_legal(dim3 grid, dim3 block, size_t shared_bytes) {
  const auto threads = static_cast<uint64_t>(block.x) * block.y * block.z;
  return threads > 0 && threads <= kMaxThreads && block.z <= 64 && grid.x > 0 && grid.x <= 0x7fffffffu && grid.y > 0 &&
         grid.y <= 65535 && grid.z > 0 && grid.z <= 65535 && shared_bytes <= machine().max_shared_bytes;
}

}  // namespace

void fail(const char* message, Here here) {
  fprintf(stderr, "CUDA emulation: %s:%d (%s): thread (%u, %u, %u) of block (%u, %u, %u): %s\n", here.file_name(),
          static_cast<int>(here.line()), here.function_name(), threadIdx.x, threadIdx.y, threadIdx.z, blockIdx.x,
          blockIdx.y, blockIdx.z, message);
  abort();
}

int thread_number() { return machine().running; }

unsigned char* dynamic_shared_memory() { return machine().dynamic; }

void block_barrier(Here here) {
  auto& m = machine();
  Fiber& own = *m.fibers[m.running];
  own.here = here;
  if (++m.at_barrier < m.num_threads) {
    own.state = State::kAtBlockBarrier;
    stop_running(own);
    return;
  }
  m.at_barrier = 0;
  for (int i = 0; i < m.num_threads; ++i) {
    check_same_place(*m.fibers[i], here);
    m.fibers[i]->state = State::kReady;
  }
}

void warp_collective(void* data, void (*function)(void* const* lanes, void* context), void* context, Here here) {
  auto& m = machine();
  Fiber& own = *m.fibers[m.running];
  const int first = m.running / 32 * 32;
  Warp& warp = m.warps[m.running / 32];
  own.here = here;
  warp.lanes[m.running % 32] = data;
  if (++warp.arrived < warp.size) {
    own.state = State::kAtWarp;
    stop_running(own);
    return;
  }
  warp.arrived = 0;
  for (int i = first; i < first + warp.size; ++i) check_same_place(*m.fibers[i], here);
  function(warp.lanes, context);
  for (int i = first; i < first + warp.size; ++i) m.fibers[i]->state = State::kReady;
}

cudaError_t run_grid(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*), void* arguments) {
  auto& m = machine();
  const std::lock_guard lock(m.mutex);
  const bool is_refused = m.launches_to_refusal >= 0 && m.launches_to_refusal-- == 0;
  if (is_refused || !is_legal(grid, block, shared_bytes)) return cudaErrorInvalidConfiguration;
  m.num_threads = static_cast<int>(block.x * block.y * block.z);
  make_fibers(m.num_threads);
  m.warps.resize((m.num_threads + 31) / 32);
  set_order(m.num_threads);
  m.dynamic_bytes = shared_bytes;
  find_static_shared();
  m.body = body;
  m.arguments = arguments;
  gridDim = grid;
  blockDim = block;
  int number = 0;
  for (unsigned z = 0; z < block.z; ++z)
    for (unsigned y = 0; y < block.y; ++y)
      for (unsigned x = 0; x < block.x; ++x) m.fibers[number++]->index = {x, y, z};
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = {x, y, z};
        run_block();
      }
  return cudaSuccess;
}

}  // namespace ml::emulated

extern "C" {

__attribute__((visibility("default"))) void ml_emulation_order(int seed) { ml::emulated::machine().order_seed = seed; }

// Makes it a device that gives a block no more than `bytes`; returns what it gave before.
__attribute__((visibility("default"))) int ml_emulation_shared(int bytes) {
  return static_cast<int>(std::exchange(ml::emulated::machine().max_shared_bytes, static_cast<size_t>(bytes)));
}

// The launch of this number from now, from 0, is refused; with -1 none. Returns how many launches stood before the one
// that was to be refused, and -1 if it has been.
__attribute__((visibility("default"))) int ml_emulation_refuse(int number) {
  return std::exchange(ml::emulated::machine().launches_to_refusal, number);
}

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : error == cudaErrorInvalidValue ? "invalid argument" : "invalid configuration";
}
cudaError_t cudaMemsetAsync(void* target, int value, size_t bytes, cudaStream_t) {
  memset(target, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  memcpy(target, source, bytes);
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
// An A100: 108 multiprocessors of compute capability 8.0.
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = 108; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor: *value = 8; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 163 * 1024; return cudaSuccess;
    default: return cudaErrorInvalidValue;
  }
}

}  // extern "C"
