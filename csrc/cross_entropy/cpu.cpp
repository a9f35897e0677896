// Cross-entropy over a shard of a vocabulary on the CPU. Arithmetic is fp32 whatever the storage format. A row's result
// depends on nothing but the row.
//
//   statistics  m = max x,  s = sum e^(x - m),  x[target],  sum x          in one pass over the logits
//   gradient    g (p (1 + 2 z lse) - label_smoothing / V - (1 - label_smoothing) [target])   in one pass
//               with p = e^(x - m) / s and lse = m + log s of the whole vocabulary, and g the gradient of the row's
//               loss
//
// The one pass of the statistics goes by blocks that stay in the L1 cache: their maximum first, then the exponentials.
// Each of the sixteen lanes has a maximum and a sum of its own, which are put together at the end of the row.

#include "cross_entropy/cpu.h"

#include "common/vec.h"

namespace {

constexpr int64_t kVectorsPerBlock = 64;  // 4 KiB of fp32
// As a maximum of nothing: below every logit, and its differences are no NaN.
constexpr float kLowest = -3.40282347e38f;

struct Lanes {
  f32x16 maximum, sum, total;
};

// Lanes from `count` on become `value`.
ML_INLINE f32x16 fill_behind(f32x16 lanes, int64_t count, float value) {
  const i32x16 index = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return index < (i32x16{} + static_cast<int32_t>(count)) ? lanes : splat(value);
}

// Raises the lanes' maxima, and brings their sums to the new ones.
ML_INLINE void raise(Lanes& lanes, f32x16 maximum) {
  const f32x16 highest = larger(maximum, lanes.maximum);
  lanes.sum *= exp(lanes.maximum - highest);
  lanes.maximum = highest;
}

template <class T, int64_t kVectors>
ML_INLINE void add_block(Lanes& lanes, const typename T::Stored* x) {
  f32x16 maximum[4], total[4], sum[4] = {};
  for (int k = 0; k < 4; ++k) maximum[k] = total[k] = T::load(x + k * kLanes);
  for (int64_t i = 4; i < kVectors; i += 4)
    for (int k = 0; k < 4; ++k) {
      const f32x16 v = T::load(x + (i + k) * kLanes);
      maximum[k] = larger(v, maximum[k]);
      total[k] += v;
    }
  raise(lanes, larger(larger(maximum[0], maximum[1]), larger(maximum[2], maximum[3])));
  lanes.total += (total[0] + total[1]) + (total[2] + total[3]);
  for (int64_t i = 0; i < kVectors; i += 4)
    for (int k = 0; k < 4; ++k) sum[k] += exp(T::load(x + (i + k) * kLanes) - lanes.maximum);
  lanes.sum += (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

template <class T>
ML_INLINE void add_vector(Lanes& lanes, const typename T::Stored* x, int64_t count) {
  const f32x16 v = T::load(x, count);
  const f32x16 filled = fill_behind(v, count, kLowest);
  raise(lanes, filled);
  lanes.total += v;
  lanes.sum += fill_behind(exp(filled - lanes.maximum), count, 0.0f);
}

ML_INLINE float max_lanes(f32x16 lanes) {
  float part[kLanes];
  __builtin_memcpy(part, &lanes, sizeof(part));
  float highest = part[0];
  for (int i = 1; i < kLanes; ++i) highest = part[i] > highest ? part[i] : highest;
  return highest;
}

// The column of the row's target, or -1 where another shard has it.
ML_INLINE int64_t target_column(const ml::CrossEntropyShard& shard, int64_t row) {
  const int64_t column = shard.targets[row] - shard.start;
  return column >= 0 && column < shard.size ? column : -1;
}

template <class T>
void statistics_of_rows(const ml::CrossEntropyShard& shard, const void* logits,
                        const ml::CrossEntropyStatistics& statistics, int64_t begin, int64_t end) {
  constexpr int64_t kBlock = kVectorsPerBlock * kLanes;
  for (int64_t row = begin; row < end; ++row) {
    if (shard.targets[row] == shard.ignored) {
      statistics.maxima[row] = statistics.picked[row] = statistics.totals[row] = 0.0f;
      statistics.sums[row] = 1.0f;
      continue;
    }
    const auto* x = static_cast<const typename T::Stored*>(logits) + row * shard.stride;
    Lanes lanes = {splat(kLowest), f32x16{}, f32x16{}};
    int64_t i = 0;
    for (; i + kBlock <= shard.size; i += kBlock) add_block<T, kVectorsPerBlock>(lanes, x + i);
    for (; i + 4 * kLanes <= shard.size; i += 4 * kLanes) add_block<T, 4>(lanes, x + i);
    for (; i < shard.size; i += kLanes) add_vector<T>(lanes, x + i, i + kLanes <= shard.size ? kLanes : shard.size - i);
    const int64_t column = target_column(shard, row);
    const float maximum = max_lanes(lanes.maximum);
    statistics.maxima[row] = maximum;
    statistics.sums[row] = sum_lanes(lanes.sum * exp(lanes.maximum - splat(maximum)));
    statistics.picked[row] = column < 0 ? -__builtin_inff() : T::load(x + column, 1)[0];
    statistics.totals[row] = sum_lanes(lanes.total);
  }
}

template <class T>
void gradient_of_rows(const ml::CrossEntropyShard& shard, const void* logits, const ml::CrossEntropySlope& slope,
                      void* gradient, int64_t begin, int64_t end) {
  using Stored = typename T::Stored;
  for (int64_t row = begin; row < end; ++row) {
    const Stored* x = static_cast<const Stored*>(logits) + row * shard.stride;
    Stored* out = static_cast<Stored*>(gradient) + row * shard.stride;
    if (shard.targets[row] == shard.ignored) {
      __builtin_memset(out, 0, shard.stride * sizeof(Stored));
      continue;
    }
    const float sum = slope.sums[row], lse = slope.maxima[row] + __builtin_logf(sum), g = slope.upstream[row];
    const float z_slope = 2.0f * slope.z_loss * lse;
    const f32x16 maximum = splat(slope.maxima[row]), base = splat(g * slope.uniform);
    const f32x16 factor = splat(g * (1.0f + z_slope) / sum);
    const int64_t column = target_column(shard, row);
    const f32x16 at_target = column < 0 ? f32x16{} : T::load(x + column, 1);  // before it is written over
    int64_t i = 0;
    for (; i + kLanes <= shard.size; i += kLanes) T::store(out + i, exp(T::load(x + i) - maximum) * factor - base);
    if (const int64_t count = shard.size - i; count > 0)
      T::store(out + i, exp(T::load(x + i, count) - maximum) * factor - base, count);
    __builtin_memset(out + shard.size, 0, (shard.stride - shard.size) * sizeof(Stored));
    if (column >= 0) {  // near 1 - 1, so the z-loss is added last
      const f32x16 p = exp(at_target - maximum) / splat(sum);
      T::store(out + column, splat(g) * ((p - splat(1.0f - slope.label_smoothing)) + p * splat(z_slope)) - base, 1);
    }
  }
}

void statistics(const ml::CrossEntropyShard& shard, const void* logits, const ml::CrossEntropyStatistics& statistics,
                int64_t begin, int64_t end) {
  switch (shard.format) {
    case ml::Format::kFp32: return statistics_of_rows<Fp32>(shard, logits, statistics, begin, end);
    case ml::Format::kBf16: return statistics_of_rows<Bf16>(shard, logits, statistics, begin, end);
    case ml::Format::kFp16: return statistics_of_rows<Fp16>(shard, logits, statistics, begin, end);
  }
}

void gradient(const ml::CrossEntropyShard& shard, const void* logits, const ml::CrossEntropySlope& slope,
              void* gradient, int64_t begin, int64_t end) {
  switch (shard.format) {
    case ml::Format::kFp32: return gradient_of_rows<Fp32>(shard, logits, slope, gradient, begin, end);
    case ml::Format::kBf16: return gradient_of_rows<Bf16>(shard, logits, slope, gradient, begin, end);
    case ml::Format::kFp16: return gradient_of_rows<Fp16>(shard, logits, slope, gradient, begin, end);
  }
}

}  // namespace

namespace ml {
extern const CrossEntropyCpu ML_FOR_ISA(cross_entropy) = {statistics, gradient};
}
