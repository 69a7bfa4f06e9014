#include "sweep.h"

#include <vector>

namespace fused_rin::operators {
namespace {

using torch::headeronly::ScalarType;
using Shape = std::vector<int64_t>;

std::string text(const Shape& shape) {
  std::string result = "[";
  for (size_t i = 0; i < shape.size(); ++i) result += (i ? ", " : "") + std::to_string(shape[i]);
  return result + "]";
}

Shape shape_of(const Tensor& tensor) {
  Shape shape(tensor.dim());
  for (size_t i = 0; i < shape.size(); ++i) shape[i] = tensor.size(static_cast<int64_t>(i));
  return shape;
}

std::string text(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    default:
      return "dtype number " + std::to_string(static_cast<int>(type));
  }
}

DType dtype_of(ScalarType type, const char* name) {
  switch (type) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      check(false, name, " must be float32, float64, bfloat16 or float16, got ", text(type));
      return {};
  }
}

Activation activation_of(const std::string& name) {
  if (name == "relu") return Activation::kReLU;
  if (name == "tanh") return Activation::kTanh;
  check(name == "none", "activation must be relu, tanh or none, got ", name);
  return Activation::kNone;
}

// Tensors as a kernel reads them: checked, contiguous, and kept for as long as the problem points into them.
class Readable {
 public:
  Readable(const Tensor& states, const char* states_name) : states_(states), states_name_(states_name) {}

  const void* operator()(const Tensor& tensor, const char* name, const Shape& shape, ScalarType type) {
    check(tensor.scalar_type() == type, name, " must have dtype ", text(type), ", got ", text(tensor.scalar_type()));
    check(shape_of(tensor) == shape, name, " must have shape ", text(shape), ", got ", text(shape_of(tensor)));
    check(tensor.device() == states_.device(), name, " must be on the device of ", states_name_);
    kept_.push_back(torch::stable::contiguous(tensor));
    const void* address = kept_.back().data_ptr();
    check(address || !tensor.numel(), name, " has no memory: its storage was freed");
    return address;
  }

  const void* operator()(const Optional& tensor, const char* name, const Shape& shape, ScalarType type) {
    return tensor ? (*this)(*tensor, name, shape, type) : nullptr;
  }

 private:
  const Tensor& states_;
  const char* states_name_;
  std::vector<Tensor> kept_;
};

}  // namespace

Result sweep(const Sweep& s, const char* device, void (*run)(const Problem&, int64_t rows)) {
  const bool backward = s.grad_out != nullptr;
  const char* name = backward ? "out" : "pre";
  Problem p{};
  p.backward = backward;
  p.dtype = dtype_of(s.states.scalar_type(), name);
  p.activation = activation_of(s.activation);
  p.skip = s.skip;
  check(s.weight.dim() == 3 && s.weight.size(1) == s.weight.size(2), "weight must have shape [G, D, D], got ",
        text(shape_of(s.weight)));
  p.groups = s.weight.size(0);
  p.hidden = s.weight.size(1);
  p.num_reversed = s.num_reversed;
  check(p.num_reversed >= 0 && p.num_reversed <= p.groups, "num_reversed must be in [0, ", p.groups, "], got ",
        p.num_reversed);
  check(!s.offsets || s.lengths, "offsets must come with lengths");
  check(!s.offsets || (s.offsets->dim() == 1 && s.lengths->dim() == 1), "lengths and offsets must have one dimension");

  const Shape shape = shape_of(s.states);
  const size_t row_axes = s.offsets ? 1 : 2;
  const Shape rows(shape.begin(), shape.begin() + (shape.size() < row_axes ? shape.size() : row_axes));
  Shape split = rows, joined = rows;
  split.insert(split.end(), {p.groups, p.hidden});
  joined.push_back(p.groups * p.hidden);
  check(rows.size() == row_axes && (shape == split || shape == joined), name, " must have shape ",
        s.offsets ? "[rows, G, D] or [rows, G * D]" : "[T, B, G, D] or [T, B, G * D]", " with G = ", p.groups,
        " and D = ", p.hidden, ", got ", text(shape));
  p.steps = s.offsets ? s.offsets->size(0) : rows[0];
  p.batch = s.offsets ? s.lengths->size(0) : rows[1];
  const Shape state{p.batch, p.groups, p.hidden};
  const ScalarType type = s.states.scalar_type();

  if (s.states.device().type() != torch::headeronly::DeviceType::Meta) {
    check(s.backend == "auto" || s.backend == device, "backend ", s.backend, " is not there without Python; ",
          "export the model with backend=\"auto\" or \"", device, "\"");
    Readable readable(s.states, name);
    p.lengths = static_cast<const int64_t*>(readable(s.lengths, "lengths", {p.batch}, ScalarType::Long));
    p.offsets = static_cast<const int64_t*>(readable(s.offsets, "offsets", {p.steps}, ScalarType::Long));
    p.resets = static_cast<const uint8_t*>(readable(s.resets, "resets", rows, ScalarType::Bool));
    p.weight = readable(s.weight, "weight", {p.groups, p.hidden, p.hidden}, type);
    p.state_in = readable(s.state_in, backward ? "grad_h_n" : "h0", state, type);
    (backward ? p.saved : p.in) = readable(s.states, name, shape, type);
    if (backward) p.in = readable(*s.grad_out, "grad_out", shape, type);
    Result result{torch::stable::new_empty(s.states, shape), torch::stable::new_empty(s.states, state)};
    p.out = std::get<0>(result).data_ptr();
    p.state_out = std::get<1>(result).data_ptr();
    run(p, s.offsets ? rows[0] : p.steps * p.batch);
    return result;
  }
  return {torch::stable::new_empty(s.states, shape), torch::stable::new_empty(s.states, state)};
}

}  // namespace fused_rin::operators
