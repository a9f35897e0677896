// What every device's kernels are told of a shard of the logits and of the loss.
#pragma once

#include "common/format.h"

namespace ml {

// logits[rows, stride]: columns 0 .. size - 1 of a row are entries start .. start + size - 1 of the vocabulary, and the
// other columns pad. targets[rows] are entries of the whole vocabulary; a row whose target is `ignored` takes no part.
struct CrossEntropyShard {
  Format format;
  int64_t stride, start, size;
  const int64_t* targets;
  int64_t ignored;
};

// Of each row over the shard's columns: the maximum m, the sum of e^(x - m), the target's logit (-infinity where it is
// in another shard), the sum of x. Of an ignored row 0, 1, 0, 0.
struct CrossEntropyStatistics {
  float *maxima, *sums, *picked, *totals;
};

// What the gradient is made of: m and the sum of e^(x - m) over the whole vocabulary, and the gradient of each row's
// loss; then the constants of the loss. `uniform` is label_smoothing / vocabulary size.
struct CrossEntropySlope {
  const float *maxima, *sums, *upstream;
  float label_smoothing, uniform, z_loss;
};

}  // namespace ml
