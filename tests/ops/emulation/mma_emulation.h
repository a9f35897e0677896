// common/mma.cuh for a CPU; included by it. Written from the PTX ISA: "Matrix Fragments for mma.m16n8k16
// with floating point type", "ldmatrix", "cp.async".
//
// An asynchronous copy arrives as late as it may: at the wait that it has to be done by. Until then NaN is there, so
// that a wait that is missing shows.

#pragma once

#include <deque>
#include <vector>

#include "common/cuda.cuh"

namespace ml {

using SharedAddress = uintptr_t;

inline SharedAddress shared_address(const void* pointer) { return reinterpret_cast<SharedAddress>(pointer); }

namespace emulated {

struct Copy {
  unsigned char *to, bytes[16];
  int size;
};

// The groups of copies that a thread has under way, the oldest first; the last one is not closed yet.
using CopyGroups = std::deque<std::vector<Copy>>;

inline CopyGroups& copy_groups() {
  static std::vector<CopyGroups> of_threads(1024, CopyGroups(1));
  return of_threads[thread_number()];
}

inline void arrive(CopyGroups& groups, size_t pending) {
  while (groups.size() > pending + 1) {
    for (const Copy& copy : groups.front()) memcpy(copy.to, copy.bytes, copy.size);
    groups.pop_front();
  }
}

}  // namespace emulated

// What is copied is read here and not later: no kernel writes what it copies from.
template <int kBytes>
void copy_async(void* shared, const void* global, bool exists) {
  if (shared_address(shared) % kBytes != 0 || (exists && shared_address(global) % kBytes != 0))
    emulated::fail("cp.async of an address that is not aligned", emulated::Here::current());
  emulated::Copy copy{static_cast<unsigned char*>(shared), {}, kBytes};
  if (exists) memcpy(copy.bytes, global, kBytes);
  memset(shared, 0xff, kBytes);
  emulated::copy_groups().back().push_back(copy);
}

inline void copy_async_commit() { emulated::copy_groups().emplace_back(); }

template <int kPending>
void copy_async_wait() {
  emulated::arrive(emulated::copy_groups(), kPending);
}

namespace emulated {

// Matrix i has its rows where lanes 8 i .. 8 i + 7 say. Lane 4 r + c receives of each matrix row r's numbers 2 c and
// 2 c + 1; transposed, column r's numbers of the rows 2 c and 2 c + 1.
inline void load_matrices(uint32_t (&r)[4], SharedAddress row, bool transposed, Here here) {
  struct Lane {
    SharedAddress row;
    uint32_t r[4];
  } lane{row, {}};
  warp_collective(lane, [=](auto& lanes) {
    for (int i = 0; i < 4; ++i) {
      uint16_t matrix[8][8];
      for (int j = 0; j < 8; ++j) {
        if (lanes[8 * i + j]->row % 16 != 0) fail("ldmatrix of a row that is not on 16 bytes", here);
        memcpy(matrix[j], reinterpret_cast<const void*>(lanes[8 * i + j]->row), 16);
      }
      for (int l = 0; l < 32; ++l) {
        const int at = l / 4, pair = l % 4 * 2;
        const uint16_t low = transposed ? matrix[pair][at] : matrix[at][pair];
        const uint16_t high = transposed ? matrix[pair + 1][at] : matrix[at][pair + 1];
        lanes[l]->r[i] = low | uint32_t(high) << 16;
      }
    }
  }, here);
  memcpy(r, lane.r, sizeof r);
}

template <class T>
float number_in(uint32_t bits, int half) {
  const uint16_t own = half == 0 ? bits & 0xffff : bits >> 16;
  T number;
  memcpy(&number, &own, 2);
  return to_float(number);
}

}  // namespace emulated

inline void load_matrices(uint32_t (&r)[4], SharedAddress row, emulated::Here here = emulated::Here::current()) {
  emulated::load_matrices(r, row, false, here);
}
inline void load_matrices_transposed(uint32_t (&r)[4], SharedAddress row,
                                     emulated::Here here = emulated::Here::current()) {
  emulated::load_matrices(r, row, true, here);
}

template <class T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                  emulated::Here here = emulated::Here::current()) {
  struct Lane {
    uint32_t a[4], b[2];
    float c[4];
  } lane{{a[0], a[1], a[2], a[3]}, {b0, b1}, {c[0], c[1], c[2], c[3]}};
  emulated::warp_collective(lane, [](auto& lanes) {
    float rows[16][16], columns[8][16];  // A; B, transposed
    for (int l = 0; l < 32; ++l) {
      const int group = l / 4, in_group = l % 4;
      for (int i = 0; i < 8; ++i) {  // a_i of the ISA
        const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
        const int column = in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0);
        rows[row][column] = emulated::number_in<T>(lanes[l]->a[i / 2], i % 2);
      }
      for (int i = 0; i < 4; ++i)  // b_i
        columns[group][in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0)] = emulated::number_in<T>(lanes[l]->b[i / 2], i % 2);
    }
    for (int l = 0; l < 32; ++l) {
      for (int i = 0; i < 4; ++i) {  // c_i
        const int row = i < 2 ? l / 4 : l / 4 + 8, column = l % 4 * 2 + (i & 1);
        float sum = lanes[l]->c[i];
        for (int k = 0; k < 16; ++k) sum += rows[row][k] * columns[column][k];
        lanes[l]->c[i] = sum;
      }
    }
  }, here);
  memcpy(c, lane.c, sizeof c);
}

inline float fast_exp2(float x) { return x < -126.0f ? 0.0f : exp2f(x); }

}  // namespace ml
