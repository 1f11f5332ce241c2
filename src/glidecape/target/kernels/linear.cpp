// x W^T + b for few rows of x, as decoding has them: reads each weight from memory once and multiplies it with all rows.
//
// Weights lie in panels of 64 outputs, (panels, inputs, 64), so that they are read in the order in which they lie. They are
// float32, bfloat16, or int8 with a scale for each output; sums are float32.

#include <vector>

#include "tile.h"

namespace glidecape {
namespace {

constexpr int64_t SMALL = 1 << 15;  // weights below which a second thread does not pay
constexpr int64_t MOST = 8 * ROWS;  // rows that are multiplied with a panel before the next, so that sums stay near

// Outputs first .. first + 63 of all rows.
template <class Weight, class Value>
void outputs_of(int64_t rows, const float* x, const Weight* panel, const float* scales, const float* bias, Value* y,
                int64_t inputs, int64_t outputs, int64_t first) {
  alignas(64) float sums[MOST * BLOCK];
  const int64_t columns = outputs - first < BLOCK ? outputs - first : BLOCK;
  for (int64_t done = 0; done < rows; done += MOST) {
    const int64_t count = rows - done < MOST ? rows - done : MOST;
    product<false>(count, x + done * inputs, inputs, panel, BLOCK, sums, BLOCK, inputs);
    for (int64_t row = 0; row < count; row++)
      for (int64_t i = 0; i < columns; i++) {
        const float sum = scales ? sums[row * BLOCK + i] * scales[first + i] : sums[row * BLOCK + i];
        store(bias ? sum + bias[first + i] : sum, y + (done + row) * outputs + first + i);
      }
  }
}

template <class Weight, class Value>
void linear(int64_t rows, const Value* x, const Weight* weights, const float* scales, const float* bias, Value* y,
            int64_t inputs, int64_t outputs) {
  std::vector<float> copy;  // of x, where it is bfloat16
  const float* numbers;
  if constexpr (sizeof(Value) == sizeof(float)) {
    numbers = x;
  } else {
    copy.resize(rows * inputs);
    for (int64_t i = 0; i < rows * inputs; i++) copy[i] = number(x[i]);
    numbers = copy.data();
  }
#pragma omp parallel for schedule(static) if (inputs * outputs > SMALL)
  for (int64_t first = 0; first < outputs; first += BLOCK)
    outputs_of(rows, numbers, weights + first * inputs, scales, bias, y, inputs, outputs, first);
}

}  // namespace
}  // namespace glidecape

// The operator glidecape::streamed_linear (operators.py), under the name by which programs call it.
extern "C" AOTITorchError aoti_torch_cpu_streamed_linear(AtenTensorHandle x, AtenTensorHandle weights,
                                                         AtenTensorHandle scales, AtenTensorHandle bias,
                                                         int64_t outputs, AtenTensorHandle* y) {
  using namespace glidecape;
  int64_t dims, elements, scaled, biases, *sizes;
  int32_t dtype, weight_dtype;
  void *from, *weight, *scale, *added, *to;
  CHECK(aoti_torch_get_dim(x, &dims));
  CHECK(aoti_torch_get_sizes(x, &sizes));
  CHECK(aoti_torch_get_numel(x, &elements));
  CHECK(aoti_torch_get_numel(scales, &scaled));
  CHECK(aoti_torch_get_numel(bias, &biases));
  CHECK(aoti_torch_get_dtype(x, &dtype));
  CHECK(aoti_torch_get_dtype(weights, &weight_dtype));
  const auto known = [](int32_t one) { return one == aoti_torch_dtype_float32() || one == aoti_torch_dtype_bfloat16(); };
  if (!known(dtype) || !(known(weight_dtype) || weight_dtype == aoti_torch_dtype_int8())) return 1;
  const int64_t inputs = sizes[dims - 1], rows = elements / inputs;
  std::vector<int64_t> shape(sizes, sizes + dims), strides(dims, 1);
  shape[dims - 1] = outputs;
  for (int64_t i = dims - 1; i > 0; i--) strides[i - 1] = strides[i] * shape[i];
  CHECK(aoti_torch_empty_strided(dims, shape.data(), strides.data(), dtype, aoti_torch_device_type_cpu(), 0, y));
  CHECK(aoti_torch_get_data_ptr(x, &from));
  CHECK(aoti_torch_get_data_ptr(weights, &weight));
  CHECK(aoti_torch_get_data_ptr(scales, &scale));
  CHECK(aoti_torch_get_data_ptr(bias, &added));
  CHECK(aoti_torch_get_data_ptr(*y, &to));
  const float* scales_or_none = scaled ? static_cast<float*>(scale) : nullptr;
  const float* bias_or_none = biases ? static_cast<float*>(added) : nullptr;
  const auto multiply = [&](auto value, auto number) {  // by the types of x and of the weights
    using Value = decltype(value);
    linear(rows, (const Value*)from, (const decltype(number)*)weight, scales_or_none, bias_or_none, (Value*)to, inputs,
           outputs);
  };
  const auto by_weight = [&](auto value) {
    if (weight_dtype == aoti_torch_dtype_int8())
      multiply(value, int8_t{});
    else if (weight_dtype == aoti_torch_dtype_bfloat16())
      multiply(value, bfloat16{});
    else
      multiply(value, float{});
  };
  if (dtype == aoti_torch_dtype_float32())
    by_weight(float{});
  else
    by_weight(bfloat16{});
  return 0;
}
