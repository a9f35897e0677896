// What the data loader does for every sample, as the Python module megatron_lite.data._index.
//
// megatron_lite/data/index.py says what each function is for; megatron_lite/data/index_reference.py has the same
// functions in numpy, which are the specification: equal results, bit for bit. All of them work on memory of numpy
// without the interpreter's lock, so that a prefetching thread leaves it to the training step.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <vector>

namespace py = pybind11;

namespace {

// Arrays are taken as they are: a copy that a conversion made would be filled in place of the caller's.
template <class T>
using Array = py::array_t<T, py::array::c_style>;

void require(bool condition, const char* what) {
  if (!condition) throw std::invalid_argument(what);
}

// Philox 4x64-10 (Salmon et al., SC 2011, section 3).
std::array<uint64_t, 4> philox(std::array<uint64_t, 4> x, uint64_t key0, uint64_t key1) {
  for (int round = 0; round < 10; ++round) {
    const unsigned __int128 a = static_cast<unsigned __int128>(0xD2E7470EE14C6C93) * x[0];
    const unsigned __int128 b = static_cast<unsigned __int128>(0xCA5A826395121157) * x[2];
    x = {static_cast<uint64_t>(b >> 64) ^ x[1] ^ key0, static_cast<uint64_t>(b),
         static_cast<uint64_t>(a >> 64) ^ x[3] ^ key1, static_cast<uint64_t>(a)};
    key0 += 0x9E3779B97F4A7C15;
    key1 += 0xBB67AE8584CAA73B;
  }
  return x;
}

// Calls use(word) for the first `count` words, each with the number of its sample in the low bits.
template <class Use>
void numbered_words(int64_t count, uint64_t seed, uint64_t epoch, uint64_t source, uint64_t low, const Use& use) {
  for (int64_t block = 0; 4 * block < count; ++block) {
    // numpy counts the blocks from 1
    const auto words = philox({static_cast<uint64_t>(block) + 1, 0, 0, source}, seed, epoch);
    const int64_t stop = std::min<int64_t>(4, count - 4 * block);
    for (int64_t n = 0; n < stop; ++n) use((words[n] & ~low) | static_cast<uint64_t>(4 * block + n));
  }
}

Array<int64_t> permutation(int64_t num_samples, uint64_t seed, uint64_t epoch, uint64_t source) {
  require(num_samples >= 1, "num_samples must be at least 1");
  Array<int64_t> result(num_samples);
  auto* sorted = reinterpret_cast<uint64_t*>(result.mutable_data());
  py::gil_scoped_release unlocked;
  int bits = 0;
  while (bits < 63 && (int64_t{1} << bits) < num_samples) ++bits;
  const uint64_t low = (uint64_t{1} << bits) - 1;
  // The words are uniform, so their first bits cut them into even buckets, and a bucket is sorted inside a core's
  // cache. The words are made twice, which is cheaper than to keep them.
  const int bucket_bits = std::clamp(bits - 8, 1, 16);
  const int shift = 64 - bucket_bits;
  std::vector<int64_t> starts((size_t{1} << bucket_bits) + 1, 0);
  numbered_words(num_samples, seed, epoch, source, low, [&](uint64_t word) { ++starts[(word >> shift) + 1]; });
  std::partial_sum(starts.begin(), starts.end(), starts.begin());
  std::vector<int64_t> next(starts.begin(), starts.end() - 1);
  numbered_words(num_samples, seed, epoch, source, low, [&](uint64_t word) { sorted[next[word >> shift]++] = word; });
  for (size_t bucket = 0; bucket < next.size(); ++bucket) {
    std::sort(sorted + starts[bucket], sorted + starts[bucket + 1]);
  }
  for (int64_t place = 0; place < num_samples; ++place) sorted[place] &= low;
  return result;
}

// One source of a blend. Its j-th sample (from 0) may come at place floor(j / w) or later, and has to have come before
// place ceil((j + 1) / w), where w = share / total.
struct Turn {
  int64_t step, step_rest;  // total / share
  int64_t time, rest;       // count / w = time + rest / share
  int64_t share;

  Turn(int64_t share_, int64_t total, int64_t count) : step(total / share_), step_rest(total % share_), share(share_) {
    const __int128 exact = static_cast<__int128>(count) * total;
    time = static_cast<int64_t>(exact / share);
    rest = static_cast<int64_t>(exact % share);
  }
  int64_t deadline() const {
    const int64_t after = rest + step_rest;
    return time + step + (after > share ? 2 : after > 0 ? 1 : 0);
  }
  void take() {
    time += step;
    rest += step_rest;
    if (rest >= share) {
      rest -= share;
      ++time;
    }
  }
};

void fill_blend(const Array<int64_t>& shares, Array<int64_t> counts, Array<uint16_t> sources) {
  require(shares.ndim() == 1 && counts.ndim() == 1 && sources.ndim() == 1, "shares, counts and sources are 1-D");
  const int64_t num_sources = shares.shape(0), num_places = sources.shape(0);
  require(num_sources >= 1 && counts.shape(0) == num_sources, "shares and counts must have one entry for each source");
  require(num_sources <= 1 << 16, "there are more sources than numbers for them");
  const int64_t* share = shares.data();
  require(std::all_of(share, share + num_sources, [](int64_t one) { return one >= 1; }), "shares must be positive");
  int64_t* count = counts.mutable_data();
  uint16_t* source = sources.mutable_data();
  py::gil_scoped_release unlocked;
  const int64_t total = std::accumulate(share, share + num_sources, int64_t{0});
  const int64_t first = std::accumulate(count, count + num_sources, int64_t{0});
  std::vector<Turn> turns;
  std::vector<int64_t> deadlines;
  for (int64_t s = 0; s < num_sources; ++s) {
    turns.emplace_back(share[s], total, count[s]);
    deadlines.push_back(turns.back().deadline());
  }
  for (int64_t place = 0; place < num_places; ++place) {
    int64_t best = 0, earliest = std::numeric_limits<int64_t>::max();
    for (int64_t s = 0; s < num_sources; ++s) {
      if (turns[s].time <= first + place && deadlines[s] < earliest) {
        best = s;
        earliest = deadlines[s];
      }
    }
    turns[best].take();
    deadlines[best] = turns[best].deadline();
    ++count[best];
    source[place] = static_cast<uint16_t>(best);
  }
}

template <class T>
int64_t gather(const T* file, const int64_t* first, const int64_t* rows, int64_t num_rows, int64_t seq_len,
               int64_t vocab_size, int64_t* tokens, int64_t* targets) {
  int64_t wrong = -1;
  for (int64_t n = 0; n < num_rows; ++n) {
    const T* from = file + first[n];
    int64_t* token = tokens + rows[n] * seq_len;
    int64_t* target = targets + rows[n] * seq_len;
    T least = from[seq_len], most = from[seq_len];
    for (int64_t j = 0; j < seq_len; ++j) {
      token[j] = static_cast<int64_t>(from[j]);
      least = std::min(least, from[j]);
      most = std::max(most, from[j]);
    }
    std::copy(token + 1, token + seq_len, target);
    target[seq_len - 1] = static_cast<int64_t>(from[seq_len]);
    const bool fits = static_cast<int64_t>(least) >= 0 && static_cast<int64_t>(most) < vocab_size;
    if (!fits && wrong < 0) wrong = n;
  }
  return wrong;
}

void check_rows(const Array<int64_t>& first, const Array<int64_t>& rows, const py::array& out) {
  require(first.ndim() == 1 && rows.ndim() == 1 && first.shape(0) == rows.shape(0), "first and rows go together");
  require(out.ndim() == 2, "what is filled has rows of seq_len");
  for (py::ssize_t n = 0; n < rows.shape(0); ++n) {
    require(rows.data()[n] >= 0 && rows.data()[n] < out.shape(0), "a row is outside what is filled");
    require(first.data()[n] >= 0, "a sample begins before its file");
  }
}

int64_t gather_tokens(const py::array& file, const Array<int64_t>& first, const Array<int64_t>& rows,
                      int64_t vocab_size, Array<int64_t> tokens, Array<int64_t> targets) {
  check_rows(first, rows, tokens);
  require(targets.ndim() == 2 && targets.shape(0) == tokens.shape(0) && targets.shape(1) == tokens.shape(1),
          "tokens and targets have one shape");
  const int64_t seq_len = tokens.shape(1), num_rows = first.shape(0);
  require(seq_len >= 1, "seq_len must be at least 1");
  require(file.ndim() == 1 && file.itemsize() == file.strides(0), "the file is one array of tokens");
  for (int64_t n = 0; n < num_rows; ++n) {
    require(first.data()[n] <= file.shape(0) - seq_len - 1, "a sample ends behind its file");
  }
  const auto* begin = first.data();
  const auto* row = rows.data();
  auto* token = tokens.mutable_data();
  auto* target = targets.mutable_data();
  const auto kind = file.dtype().kind();
  const auto size = file.itemsize();
  const void* data = file.data();
  py::gil_scoped_release unlocked;
  const auto run = [&](auto type) {
    using T = decltype(type);
    return gather(static_cast<const T*>(data), begin, row, num_rows, seq_len, vocab_size, token, target);
  };
  if (kind == 'u' && size == 1) return run(uint8_t{});
  if (kind == 'u' && size == 2) return run(uint16_t{});
  if (kind == 'i' && size == 1) return run(int8_t{});
  if (kind == 'i' && size == 2) return run(int16_t{});
  if (kind == 'i' && size == 4) return run(int32_t{});
  if (kind == 'i' && size == 8) return run(int64_t{});
  throw std::invalid_argument("no dtype of a token file");
}

void mark_documents(const Array<int64_t>& starts, const Array<int64_t>& first, const Array<int64_t>& rows,
                    Array<int32_t> documents, Array<int64_t> positions) {
  check_rows(first, rows, documents);
  require(positions.ndim() == 2 && positions.shape(0) == documents.shape(0) &&
              positions.shape(1) == documents.shape(1),
          "documents and positions have one shape");
  const int64_t seq_len = documents.shape(1), num_rows = first.shape(0);
  const int64_t *begin = starts.data(), *end = begin + starts.size();
  const int64_t *from = first.data(), *row = rows.data();
  int32_t* document = documents.mutable_data();
  int64_t* position = positions.mutable_data();
  py::gil_scoped_release unlocked;
  for (int64_t n = 0; n < num_rows; ++n) {
    const int64_t* next = std::upper_bound(begin, end, from[n]);
    int32_t* ids = document + row[n] * seq_len;
    int64_t* places = position + row[n] * seq_len;
    int32_t id = 0;
    for (int64_t j = 0; j < seq_len; ++next, ++id) {
      const int64_t stop = next == end ? seq_len : std::min(seq_len, *next - from[n]);
      std::fill(ids + j, ids + stop, id);
      std::iota(places + j, places + stop, int64_t{0});
      j = stop;
    }
  }
}

}  // namespace

PYBIND11_MODULE(_index, module) {
  module.def("permutation", &permutation);
  module.def("fill_blend", &fill_blend, py::arg("shares").noconvert(), py::arg("counts").noconvert(),
             py::arg("sources").noconvert());
  module.def("gather_tokens", &gather_tokens, py::arg("file").noconvert(), py::arg("first").noconvert(),
             py::arg("rows").noconvert(), py::arg("vocab_size"), py::arg("tokens").noconvert(),
             py::arg("targets").noconvert());
  module.def("mark_documents", &mark_documents, py::arg("starts").noconvert(), py::arg("first").noconvert(),
             py::arg("rows").noconvert(), py::arg("documents").noconvert(), py::arg("positions").noconvert());
}
