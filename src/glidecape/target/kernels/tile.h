// The one product that all kernels are made of: a few rows times a panel of numbers that is read once.
//
// The sum of an output runs over the inputs in their order, whatever the number of rows and whatever stands beside: an output
// has the same bits in any company.

#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace glidecape {

// Lanes of a vector register, and how many rows and vectors of outputs fit into the registers at once.
#if defined(__AVX512F__)
constexpr int LANES = 16, VECTORS = 4, ROWS = 8;
#elif defined(__AVX__)
constexpr int LANES = 8, VECTORS = 2, ROWS = 6;
#else
constexpr int LANES = 4, VECTORS = 4, ROWS = 6;
#endif
constexpr int BLOCK = 64;  // columns of a panel
constexpr int AHEAD = 32;  // inputs whose numbers are fetched beforehand

using Vector = float __attribute__((vector_size(LANES * 4)));
using Integers = int32_t __attribute__((vector_size(LANES * 4)));
using Bits = uint32_t __attribute__((vector_size(LANES * 4)));
using Bytes = int8_t __attribute__((vector_size(LANES)));
using Halves = uint16_t __attribute__((vector_size(LANES * 2)));
using bfloat16 = uint16_t;  // the upper half of a float

template <class To, class From>
inline To bits_of(const From& from) {
  To to;
  static_assert(sizeof to == sizeof from);
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline Vector load(const float* from) {
  Vector found;
  std::memcpy(&found, from, sizeof found);
  return found;
}

inline Vector load(const bfloat16* from) {
  Halves halves;
  std::memcpy(&halves, from, sizeof halves);
  const Bits bits = __builtin_convertvector(halves, Bits) << 16;
  return bits_of<Vector>(bits);
}

inline Vector load(const int8_t* from) {
  // GCC converts vectors of bytes one by one.
#if defined(__AVX512F__)
  return bits_of<Vector>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from))));
#elif defined(__AVX2__)
  return bits_of<Vector>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from))));
#else
  Bytes bytes;
  std::memcpy(&bytes, from, sizeof bytes);
  return __builtin_convertvector(__builtin_convertvector(bytes, Integers), Vector);
#endif
}

inline Vector load_some(const float* from, int count) {
  Vector found{};
  std::memcpy(&found, from, count * sizeof(float));
  return found;
}

inline Vector load_some(const bfloat16* from, int count) {
  bfloat16 some[LANES] = {};
  std::memcpy(some, from, count * sizeof(bfloat16));
  return load(some);
}

inline float number(float value) { return value; }

inline float number(bfloat16 value) { return bits_of<float>(uint32_t(value) << 16); }

inline void store(float value, float* to) { *to = value; }

inline void store(float value, bfloat16* to) {  // the nearest one, ties to even
  const auto bits = bits_of<uint32_t>(value);
  *to = value != value ? bfloat16(0x7fc0) : bfloat16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// LANES vectors of LANES numbers: columns become rows. In step S, blocks of S x S that lie across the diagonal are exchanged.
template <int S, size_t... I>
inline void exchange(Vector& low, Vector& high, std::index_sequence<I...>) {
  const Vector first = __builtin_shufflevector(low, high, (I & S ? I - S + LANES : I)...);
  high = __builtin_shufflevector(low, high, (I & S ? I + LANES : I + S)...);
  low = first;
}

template <int S = 1>
inline void transpose(Vector (&rows)[LANES]) {
  if constexpr (S < LANES) {
    for (int i = 0; i < LANES; i++)
      if (!(i & S)) exchange<S>(rows[i], rows[i + S], std::make_index_sequence<LANES>());
    transpose<2 * S>(rows);
  }
}

// sums (Rows, VECTORS x LANES) = x (Rows, inputs) times panel (inputs, VECTORS x LANES), added to what is there or not.
// The strides are those of rows, in numbers.
template <bool Add, class Number, int Rows>
void tile(const float* x, int64_t x_stride, const Number* panel, int64_t panel_stride, float* sums, int64_t sums_stride,
          int64_t inputs) {
  Vector sum[Rows][VECTORS];
  for (int row = 0; row < Rows; row++)
    for (int v = 0; v < VECTORS; v++) sum[row][v] = Add ? load(sums + row * sums_stride + v * LANES) : Vector{};
  for (int64_t k = 0; k < inputs; k++, panel += panel_stride) {
    Vector numbers[VECTORS];
    for (int v = 0; v < VECTORS; v++) numbers[v] = load(panel + v * LANES);
    const char* ahead = reinterpret_cast<const char*>(panel + AHEAD * panel_stride);
    for (int byte = 0; byte < int(VECTORS * LANES * sizeof(Number)); byte += 64) __builtin_prefetch(ahead + byte);
    for (int row = 0; row < Rows; row++)
      for (int v = 0; v < VECTORS; v++) sum[row][v] += x[row * x_stride + k] * numbers[v];
  }
  for (int row = 0; row < Rows; row++)
    for (int v = 0; v < VECTORS; v++) std::memcpy(sums + row * sums_stride + v * LANES, &sum[row][v], sizeof(Vector));
}

template <bool Add, class Number, int Rows = ROWS>
void tile_of(int64_t rows, const float* x, int64_t x_stride, const Number* panel, int64_t panel_stride, float* sums,
             int64_t sums_stride, int64_t inputs) {
  if constexpr (Rows > 0) {
    if (rows == Rows)
      tile<Add, Number, Rows>(x, x_stride, panel, panel_stride, sums, sums_stride, inputs);
    else
      tile_of<Add, Number, Rows - 1>(rows, x, x_stride, panel, panel_stride, sums, sums_stride, inputs);
  }
}

// The same for any number of rows and for BLOCK columns.
template <bool Add, class Number>
void product(int64_t rows, const float* x, int64_t x_stride, const Number* panel, int64_t panel_stride, float* sums,
             int64_t sums_stride, int64_t inputs) {
  const int64_t parts = (rows + ROWS - 1) / ROWS;
  for (int64_t part = 0, done = 0; part < parts; part++) {
    const int64_t end = rows * (part + 1) / parts;
    for (int column = 0; column < BLOCK; column += VECTORS * LANES)
      tile_of<Add>(end - done, x + done * x_stride, x_stride, panel + column, panel_stride,
                   sums + done * sums_stride + column, sums_stride, inputs);
    done = end;
  }
}

}  // namespace glidecape

#define CHECK(call) \
  if (AOTITorchError error = (call)) return error
