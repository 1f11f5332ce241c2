// Attention of tree nodes to their own paths. The sums of a node run over the positions of its path in their order, wherever
// the keys lie, so a node has the same bits in any tree, in any batch, and alone.
//
// Most positions of a path lie in the slot of their own number: committed tokens, and the tree's first branch. These keys are
// read once for all nodes of a row. The rest of each path is gathered.

#include <algorithm>
#include <limits>
#include <vector>

#include "tile.h"

namespace glidecape {
namespace {

constexpr int64_t QUERIES = 32;  // nodes and heads that read keys together

struct Tensor {
  void* data;
  int64_t *sizes, *strides;

  template <class Value>
  const Value* at(int64_t i, int64_t j, int64_t k) const {
    return static_cast<const Value*>(data) + i * strides[0] + j * strides[1] + k * strides[2];
  }
};

struct Inputs {
  Tensor q, k, v;              // (rows, heads, nodes, dim), (rows, kv_heads, slots, dim); the last dimension is dense
  const int64_t* lengths;      // (rows,) committed slots
  const int64_t* positions;    // (rows, scratch) of scratch slots, which begin at the length
  const bool* ancestors;       // (rows, nodes, scratch): slots on a node's path, its own included
  const bool* seen;            // (rows or 1, nodes, keys): may a position be read? null: all
  int64_t scratch, keys, seen_rows;
  float scale, cap;            // cap 0: none
};

// e^x, within two units in the last place; 0 below -87.
inline Vector exponential(Vector x) {
  const Vector low = Vector{} - 87.f, high = Vector{} + 88.f;
  x = x < low ? low : x;
  x = x > high ? high : x;
  const Vector turns = x * 1.44269504f;
  const Integers whole = __builtin_convertvector(turns + (turns < 0 ? Vector{} - 0.5f : Vector{} + 0.5f), Integers);
  const Vector n = __builtin_convertvector(whole, Vector);
  const Vector r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vector sum = Vector{} + 1.9875691500e-4f;
  for (float factor : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    sum = sum * r + factor;
  sum = sum * r * r + r + 1.f;
  const Vector found = sum * bits_of<Vector>((whole + 127) << 23);
  return x <= low ? Vector{} : found;
}

// The path of one node beyond the committed slots.
struct Path {
  int64_t own;                 // first position that does not lie in the slot of its number
  std::vector<int64_t> slots;  // of positions length .. end
};

Path path_of(const Inputs& in, int64_t row, int64_t node) {
  const int64_t length = in.lengths[row];
  const bool* on_path = in.ancestors + (row * in.q.sizes[2] + node) * in.scratch;
  Path path{length, std::vector<int64_t>(std::count(on_path, on_path + in.scratch, true))};
  const int64_t count = path.slots.size();
  for (int64_t slot = 0; slot < in.scratch; slot++) {
    if (!on_path[slot]) continue;
    const int64_t depth = in.positions[row * in.scratch + slot] - length;
    if (depth >= 0 && depth < count) path.slots[depth] = length + slot;
  }
  while (path.own < length + count && path.slots[path.own - length] == path.own) path.own++;
  return path;
}

// Scores to weights: e^(score - largest) for positions that may be read, else 0; returns one over their sum.
float weights_of(float* scores, const bool* seen, int64_t count, float cap) {
  float largest = -std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < count; i++) {
    if (cap > 0) {
      const Vector power = exponential(Vector{} + 2 * std::clamp(scores[i] / cap, -15.f, 15.f));
      scores[i] = cap * (1 - 2 / (power[0] + 1));  // tanh
    }
    if (!seen || seen[i]) largest = std::max(largest, scores[i]);
  }
  for (int64_t i = count; i % LANES; i++) scores[i] = largest;
  Vector sum{};
  for (int64_t i = 0; i < count; i += LANES) {
    Vector weight = exponential(load(scores + i) - largest);
    if (seen || i + LANES > count)
      for (int lane = 0; lane < LANES; lane++)
        if (i + lane >= count || (seen && !seen[i + lane])) weight[lane] = 0;
    std::memcpy(scores + i, &weight, sizeof weight);
    sum += weight;
  }
  float total = 0;
  for (int lane = 0; lane < LANES; lane++) total += sum[lane];
  return 1 / total;
}

// One row, one key-value head, and some of its nodes and query heads.
template <class Value>
class Reader {
 public:
  explicit Reader(const Inputs& in)
      : in(in), dim(in.q.sizes[3]), panels((dim + BLOCK - 1) / BLOCK), room((in.keys / BLOCK + 2) * BLOCK) {
    static thread_local std::vector<float> memory;  // kept: it is large, and calls are many
    const int64_t sizes[] = {QUERIES * dim, QUERIES * room, QUERIES * panels * BLOCK,
                             std::max(dim, panels * BLOCK) * BLOCK};
    memory.resize(std::max<size_t>(memory.size(), sizes[0] + sizes[1] + sizes[2] + sizes[3]));
    q = memory.data(), scores = q + sizes[0], out = scores + sizes[1], panel = out + sizes[2];
  }

  void read(int64_t row, int64_t kv_head, int64_t first, int64_t count, Value* y) {
    const int64_t heads = in.q.sizes[1], group = heads / in.k.sizes[1], nodes = in.q.sizes[2], length = in.lengths[row];
    Path paths[QUERIES];
    int64_t shared = 0, begin = in.seen ? length : 0;
    for (int64_t i = 0; i < count; i++) {
      const int64_t node = (first + i) / group, head = kv_head * group + (first + i) % group;
      paths[i] = i && node == (first + i - 1) / group ? paths[i - 1] : path_of(in, row, node);
      shared = std::max(shared, paths[i].own);
      const Value* from = in.q.template at<Value>(row, head, node);
      for (int64_t d = 0; d < dim; d++) q[i * dim + d] = number(from[d]) * in.scale;
      if (in.seen) begin = std::find(seen_by(row, node), seen_by(row, node) + begin, true) - seen_by(row, node);
    }
    begin -= begin % BLOCK;  // what nobody sees before this is left out
    for (int64_t at = begin; at < shared; at += BLOCK) {
      const int64_t keys = std::min<int64_t>(BLOCK, shared - at);
      lay_keys(row, kv_head, keys, [&](int64_t j) { return at + j; });
      product<false>(count, q, dim, panel, BLOCK, scores + at, room, dim);
    }
    for (int64_t i = 0; i < count; i++)
      own_part(paths[i], length, [&](int64_t at, const int64_t* slots, int64_t keys) {
        alignas(64) float sums[BLOCK];
        lay_keys(row, kv_head, keys, [&](int64_t j) { return slots[j]; });
        product<false>(1, q + i * dim, dim, panel, BLOCK, sums, BLOCK, dim);
        std::copy(sums, sums + keys, scores + i * room + at);
      });
    float share[QUERIES];
    for (int64_t i = 0; i < count; i++) {
      const int64_t node = (first + i) / group, end = length + paths[i].slots.size();
      const bool* seen = in.seen ? seen_by(row, node) + begin : nullptr;
      share[i] = weights_of(scores + i * room + begin, seen, end - begin, in.cap);
    }
    mix_values(row, kv_head, count, begin, shared, length, paths);
    for (int64_t i = 0; i < count; i++) {
      const int64_t node = (first + i) / group, head = kv_head * group + (first + i) % group;
      Value* to = y + ((row * nodes + node) * heads + head) * dim;
      for (int64_t d = 0; d < dim; d++) store(out[i * panels * BLOCK + d] * share[i], to + d);
    }
  }

 private:
  const Inputs& in;
  const int64_t dim, panels, room;
  float *q, *scores, *out, *panel;  // (QUERIES, dim), (QUERIES, room), (QUERIES, panels x BLOCK), one panel

  const bool* seen_by(int64_t row, int64_t node) const {
    return in.seen + ((in.seen_rows > 1 ? row : 0) * in.q.sizes[2] + node) * in.keys;
  }

  // The keys in slots as columns of the panel, (dim, BLOCK); slot(j) is that of column j.
  template <class Slot>
  void lay_keys(int64_t row, int64_t kv_head, int64_t keys, Slot slot) {
    for (int64_t j = 0; j < keys; j += LANES)
      for (int64_t d = 0; d < dim; d += LANES) {
        const int some = std::min<int64_t>(LANES, keys - j), width = std::min<int64_t>(LANES, dim - d);
        Vector vectors[LANES] = {};
        for (int i = 0; i < some; i++) {
          const Value* from = in.k.template at<Value>(row, kv_head, slot(j + i)) + d;
          vectors[i] = width == LANES ? load(from) : load_some(from, width);
        }
        transpose(vectors);
        for (int i = 0; i < width; i++) std::memcpy(panel + (d + i) * BLOCK + j, &vectors[i], sizeof(Vector));
      }
  }

  // The values in slots as rows of the panel, (keys, panels x BLOCK).
  template <class Slot>
  void lay_values(int64_t row, int64_t kv_head, int64_t keys, Slot slot) {
    for (int64_t j = 0; j < keys; j++) {
      const Value* from = in.v.template at<Value>(row, kv_head, slot(j));
      float* to = panel + j * panels * BLOCK;
      int64_t d = 0;
      for (; d + LANES <= dim; d += LANES) {
        const Vector vector = load(from + d);
        std::memcpy(to + d, &vector, sizeof vector);
      }
      for (; d < dim; d++) to[d] = number(from[d]);
    }
  }

  // Calls visit(first position, slots, count) for the positions that do not lie in the slot of their number.
  template <class Visit>
  void own_part(const Path& path, int64_t length, Visit visit) {
    const int64_t end = length + path.slots.size();
    for (int64_t at = path.own; at < end; at += BLOCK)
      visit(at, path.slots.data() + at - length, std::min<int64_t>(BLOCK, end - at));
  }

  void mix_values(int64_t row, int64_t kv_head, int64_t count, int64_t begin, int64_t shared, int64_t length,
                  const Path* paths) {
    const int64_t width = panels * BLOCK;
    int64_t least = shared;
    for (int64_t i = 0; i < count; i++) least = std::min(least, paths[i].own);
    std::fill(out, out + count * width, 0.f);
    alignas(64) float weights[QUERIES * BLOCK];
    for (int64_t at = begin; at < shared; at += BLOCK) {
      const int64_t keys = std::min<int64_t>(BLOCK, shared - at);
      lay_values(row, kv_head, keys, [&](int64_t j) { return at + j; });
      const float* share = scores + at;
      int64_t stride = room;
      if (at + keys > least) {  // some node's path has left the slots of its positions
        for (int64_t i = 0; i < count; i++)
          for (int64_t j = 0; j < keys; j++)
            weights[i * BLOCK + j] = at + j < paths[i].own ? share[i * room + j] : 0;
        share = weights, stride = BLOCK;
      }
      for (int64_t column = 0; column < width; column += BLOCK)
        product<true>(count, share, stride, panel + column, width, out + column, width, keys);
    }
    for (int64_t i = 0; i < count; i++)
      own_part(paths[i], length, [&](int64_t at, const int64_t* slots, int64_t keys) {
        lay_values(row, kv_head, keys, [&](int64_t j) { return slots[j]; });
        for (int64_t column = 0; column < width; column += BLOCK)
          product<true>(1, scores + i * room + at, room, panel + column, width,
                        out + i * width + column, width, keys);
      });
  }
};

template <class Value>
void attention(const Inputs& in, Value* y) {
  const int64_t rows = in.q.sizes[0], kv_heads = in.k.sizes[1], reads = in.q.sizes[1] / kv_heads * in.q.sizes[2];
  const int64_t parts = (reads + QUERIES - 1) / QUERIES;
#pragma omp parallel if (rows * kv_heads * parts > 1)
  {
    Reader<Value> reader(in);
#pragma omp for schedule(static)
    for (int64_t unit = 0; unit < rows * kv_heads * parts; unit++) {
      const int64_t part = unit % parts, head = unit / parts % kv_heads, first = reads * part / parts;
      reader.read(unit / parts / kv_heads, head, first, reads * (part + 1) / parts - first, y);
    }
  }
}

AOTITorchError look(AtenTensorHandle handle, Tensor& tensor) {
  CHECK(aoti_torch_get_data_ptr(handle, &tensor.data));
  CHECK(aoti_torch_get_sizes(handle, &tensor.sizes));
  return aoti_torch_get_strides(handle, &tensor.strides);
}

}  // namespace
}  // namespace glidecape

// The operator glidecape::tree_attention (operators.py), under the name by which programs call it.
extern "C" AOTITorchError aoti_torch_cpu_tree_attention(AtenTensorHandle q, AtenTensorHandle k, AtenTensorHandle v,
                                                        AtenTensorHandle lengths, AtenTensorHandle positions,
                                                        AtenTensorHandle ancestors, AtenTensorHandle seen, double scale,
                                                        double cap, AtenTensorHandle* y) {
  using namespace glidecape;
  Inputs in;
  Tensor of_lengths, of_positions, of_ancestors, of_seen;
  int64_t visible;
  int32_t dtype, of_keys, of_values;
  void* to;
  CHECK(look(q, in.q));
  CHECK(look(k, in.k));
  CHECK(look(v, in.v));
  CHECK(look(lengths, of_lengths));
  CHECK(look(positions, of_positions));
  CHECK(look(ancestors, of_ancestors));
  CHECK(look(seen, of_seen));
  CHECK(aoti_torch_get_numel(seen, &visible));
  CHECK(aoti_torch_get_dtype(q, &dtype));
  CHECK(aoti_torch_get_dtype(k, &of_keys));
  CHECK(aoti_torch_get_dtype(v, &of_values));
  if (of_keys != dtype || of_values != dtype) return 1;
  in.lengths = static_cast<const int64_t*>(of_lengths.data);
  in.positions = static_cast<const int64_t*>(of_positions.data);
  in.ancestors = static_cast<const bool*>(of_ancestors.data);
  in.seen = visible ? static_cast<const bool*>(of_seen.data) : nullptr;
  in.scratch = of_positions.sizes[1], in.keys = in.k.sizes[2], in.seen_rows = of_seen.sizes[0];
  in.scale = scale, in.cap = cap;
  const int64_t *sizes = in.q.sizes, heads = sizes[1] * sizes[3];
  const int64_t shape[] = {sizes[0], sizes[2], sizes[1], sizes[3]}, strides[] = {sizes[2] * heads, heads, sizes[3], 1};
  CHECK(aoti_torch_empty_strided(4, shape, strides, dtype, aoti_torch_device_type_cpu(), 0, y));
  CHECK(aoti_torch_get_data_ptr(*y, &to));
  if (dtype == aoti_torch_dtype_float32())
    attention(in, static_cast<float*>(to));
  else if (dtype == aoti_torch_dtype_bfloat16())
    attention(in, static_cast<bfloat16*>(to));
  else
    return 1;
  return 0;
}
