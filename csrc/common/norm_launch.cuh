// Which kernels of norm.cuh a row takes, and how they are launched.
#pragma once

#include "common/norm.cuh"

namespace ml {
namespace {

// How a row is spread over `threads` threads: each holds `packs` packs or, where that is 0, goes through the row. An
// access moves `size` numbers.
struct Spread {
  int packs, threads, size;
};

template <class T>
Spread spread_of(int64_t dim, bool aligned) {
  constexpr int kSize = kPackSize<T>;
  const int64_t num_packs = dim / kSize;
  if (!aligned || dim % kSize != 0) return {0, kMaxThreads, 1};
  if (num_packs > 4 * kMaxThreads) return {0, kMaxThreads, kSize};
  const int packs = num_packs <= 128 ? 1 : num_packs <= 512 ? 2 : 4;
  const int64_t threads = (num_packs + packs - 1) / packs;
  return {packs, static_cast<int>((threads + 31) / 32 * 32), kSize};
}

template <class T, class W, bool kCentred, bool kAdds>
int launch_forward(const NormForwardCuda& in, cudaStream_t stream) {
  const ForwardArgs<T, W> args{static_cast<const T*>(in.x),
                               static_cast<const T*>(in.residual),
                               static_cast<const W*>(in.weight),
                               static_cast<const W*>(in.bias),
                               static_cast<T*>(in.sum),
                               static_cast<T*>(in.y),
                               in.mean,
                               in.rstd,
                               in.dim,
                               in.eps};
  const Spread spread =
      spread_of<T>(in.dim, on_16_bytes(args.x, args.residual, args.weight, args.bias, args.sum, args.y));
  const auto start = [&](auto kernel) -> int {
    return launch(kernel, in.rows, spread.threads, 0, stream, args);
  };
  switch (spread.packs) {
    case 1: return start(norm_forward_packed<T, W, 1, kCentred, kAdds>);
    case 2: return start(norm_forward_packed<T, W, 2, kCentred, kAdds>);
    case 4: return start(norm_forward_packed<T, W, 4, kCentred, kAdds>);
    default:
      return spread.size == 1 ? start(norm_forward_any<T, W, 1, kCentred, kAdds>)
                              : start(norm_forward_any<T, W, kPackSize<T>, kCentred, kAdds>);
  }
}

template <class T, class W, bool kCentred, bool kAdds>
int launch_backward(const NormBackwardCuda& in, cudaStream_t stream) {
  const BackwardArgs<T, W> args{static_cast<const T*>(in.dy),
                                static_cast<const T*>(in.dsum),
                                static_cast<const T*>(in.input),
                                static_cast<const W*>(in.weight),
                                in.mean,
                                in.rstd,
                                static_cast<T*>(in.dx),
                                in.weight_parts,
                                in.bias_parts,
                                in.rows,
                                in.dim};
  const Spread spread = spread_of<T>(
      in.dim, on_16_bytes(args.dy, args.dsum, args.input, args.weight, args.dx, in.weight_parts, in.bias_parts));
  const int64_t num_blocks = (in.rows + kCudaRowsPerBlock - 1) / kCudaRowsPerBlock;
  const auto start = [&](auto kernel) -> int {
    return launch(kernel, num_blocks, spread.threads, 0, stream, args);
  };
  int code = cudaSuccess;
  switch (num_blocks > 0 ? spread.packs : -1) {
    case -1: break;  // no rows: the gradients of weight and bias are zero, and a grid of no blocks is an error
    case 1: code = start(norm_backward_packed<T, W, 1, kCentred, kAdds>); break;
    case 2: code = start(norm_backward_packed<T, W, 2, kCentred, kAdds>); break;
    case 4: code = start(norm_backward_packed<T, W, 4, kCentred, kAdds>); break;
    default:
      code = spread.size == 1 ? start(norm_backward_any<T, W, 1, kCentred, kAdds>)
                              : start(norm_backward_any<T, W, kPackSize<T>, kCentred, kAdds>);
  }
  const int64_t columns = (in.dim + 127) / 128;
  const auto sum = [&](const float* parts, void* total) -> int {
    return launch(norm_sum_parts<W>, columns, 128, 0, stream, parts, static_cast<W*>(total), num_blocks, in.dim);
  };
  if (code == cudaSuccess) code = sum(in.weight_parts, in.dweight);
  if (code == cudaSuccess && in.dbias != nullptr) code = sum(in.bias_parts, in.dbias);
  return code;
}

// What `call` returns for the two formats as types. The weight is of x's format, or fp32.
template <class Call>
int with_types(Format format, Format weight_format, Call call) {
  if (format != weight_format && weight_format != Format::kFp32) return cudaErrorInvalidValue;
  const bool wide_weight = weight_format == Format::kFp32;
  switch (format) {
    case Format::kFp32: return call(float{}, float{});
    case Format::kBf16: return wide_weight ? call(__nv_bfloat16{}, float{}) : call(__nv_bfloat16{}, __nv_bfloat16{});
    case Format::kFp16: return wide_weight ? call(__half{}, float{}) : call(__half{}, __half{});
  }
  return cudaErrorInvalidValue;
}

template <bool kCentred>
int norm_forward(Format format, Format weight_format, const NormForwardCuda& in, void* stream_) {
  if (in.rows == 0) return cudaSuccess;
  const auto stream = static_cast<cudaStream_t>(stream_);
  return with_types(format, weight_format, [&](auto t, auto w) {
    return in.residual != nullptr ? launch_forward<decltype(t), decltype(w), kCentred, true>(in, stream)
                                  : launch_forward<decltype(t), decltype(w), kCentred, false>(in, stream);
  });
}

template <bool kCentred>
int norm_backward(Format format, Format weight_format, const NormBackwardCuda& in, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  return with_types(format, weight_format, [&](auto t, auto w) {
    return in.dsum != nullptr ? launch_backward<decltype(t), decltype(w), kCentred, true>(in, stream)
                              : launch_backward<decltype(t), decltype(w), kCentred, false>(in, stream);
  });
}

}  // namespace
}  // namespace ml
