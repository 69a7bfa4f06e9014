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
  if (name == "sigmoid") return Activation::kSigmoid;
  if (name == "softplus") return Activation::kSoftplus;
  if (name == "leaky_relu") return Activation::kLeakyReLU;
  check(name == "none", "activation must be relu, tanh, sigmoid, softplus, leaky_relu or none, got ", name);
  return Activation::kNone;
}

Form form_of(const std::string& name) {
  if (name == "inside") return Form::kInside;
  if (name == "outside") return Form::kOutside;
  check(name == "current", "form must be inside, outside or current, got ", name);
  return Form::kCurrent;
}

// Tensors as a kernel reads them: checked, contiguous, padded, and kept for as long as the problem points into them.
class Readable {
 public:
  Readable(const Tensor& states, const char* states_name, const Device& device, int64_t hidden, int64_t padding)
      : states_(states), states_name_(states_name), device_(device), hidden_(hidden), padding_(padding) {}

  // D units at the end of each row; of U's, in the axis before it too.
  const void* units(const Tensor& tensor, const char* name, const Shape& shape, size_t axes = 1) {
    Tensor plain = checked(tensor, name, shape, states_.scalar_type());
    if (padding_) {
      Shape rows{-1}, sides;
      for (size_t axis = 0; axis < axes; ++axis) {
        rows.push_back(hidden_);
        sides.insert(sides.end(), {0, padding_});
      }
      plain = torch::stable::pad(torch::stable::reshape(plain, rows), sides);
    } else if (reinterpret_cast<uintptr_t>(plain.data_ptr()) % device_.row_bytes) {
      plain = torch::stable::clone(plain);
    }
    return kept(plain);
  }

  const void* units(const Optional& tensor, const char* name, const Shape& shape) {
    return tensor ? units(*tensor, name, shape) : nullptr;
  }

  // In the type that sums have.
  const void* scalars(const Tensor& tensor, const char* name, const Shape& shape) {
    const bool wide = states_.scalar_type() == ScalarType::Double;
    const Tensor plain = checked(tensor, name, shape, wide ? ScalarType::Double : ScalarType::Float);
    return kept(padding_ ? torch::stable::pad(plain, Shape{0, padding_}) : plain);
  }

  const int64_t* numbers(const Optional& tensor, const char* name, const Shape& shape) {
    return tensor ? static_cast<const int64_t*>(kept(checked(*tensor, name, shape, ScalarType::Long))) : nullptr;
  }

  // Kernels that read aligned rows read these four at a time.
  const uint8_t* flags(const Optional& tensor, const char* name, const Shape& shape) {
    if (!tensor) return nullptr;
    Tensor plain = checked(*tensor, name, shape, ScalarType::Bool);
    if (device_.row_bytes > 1)
      plain = torch::stable::pad(torch::stable::reshape(plain, Shape{-1}), Shape{0, 3 - (plain.numel() + 3) % 4});
    return static_cast<const uint8_t*>(kept(plain));
  }

 private:
  Tensor checked(const Tensor& tensor, const char* name, const Shape& shape, ScalarType type) const {
    check(tensor.scalar_type() == type, name, " must have dtype ", text(type), ", got ", text(tensor.scalar_type()));
    check(shape_of(tensor) == shape, name, " must have shape ", text(shape), ", got ", text(shape_of(tensor)));
    check(tensor.device() == states_.device(), name, " must be on the device of ", states_name_);
    // Of a freed storage the address is null and the offset into it, which `contiguous` would read.
    const uintptr_t offset = static_cast<uintptr_t>(tensor.storage_offset()) * tensor.element_size();
    check(reinterpret_cast<uintptr_t>(tensor.data_ptr()) != offset || !tensor.numel(), name,
          " has no memory: its storage was freed");
    return torch::stable::contiguous(tensor);
  }

  const void* kept(const Tensor& tensor) {
    kept_.push_back(tensor);
    return tensor.data_ptr();
  }

  const Tensor& states_;
  const char* states_name_;
  const Device& device_;
  int64_t hidden_, padding_;
  std::vector<Tensor> kept_;
};

// A result: with room for the padding while a kernel writes it, without afterwards.
class Written {
 public:
  Written(const Tensor& like, const Shape& shape, const Shape& split, int64_t padding)
      : shape_(shape), hidden_(split.back()), padding_(padding), tensor_(empty(like, shape, split, padding)) {}

  void* address() const { return tensor_.data_ptr(); }

  Tensor tensor() {
    if (!padding_) return tensor_;
    return torch::stable::reshape(torch::stable::narrow(tensor_, -1, 0, hidden_), shape_);
  }

 private:
  static Tensor empty(const Tensor& like, const Shape& shape, Shape split, int64_t padding) {
    if (!padding) return torch::stable::new_empty(like, shape);
    split.back() += padding;
    return torch::stable::new_empty(like, split);
  }

  Shape shape_;
  int64_t hidden_, padding_;
  Tensor tensor_;
};

}  // namespace

UnitsResult sweep(const Sweep& s, const Units* units, const Device& device) {
  const bool backward = s.grad_out != nullptr;
  const char* name = !backward ? "pre" : units ? "saved" : "out";
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
  if (units) p.form = form_of(units->form);
  const bool outside = p.form == Form::kOutside;
  const Shape aside_shape = outside ? shape : Shape{0};
  if (s.states.device().type() == torch::headeronly::DeviceType::Meta)
    return {torch::stable::new_empty(s.states, shape), torch::stable::new_empty(s.states, state),
            torch::stable::new_empty(s.states, aside_shape)};
  check(device.is_mine(s.states), name, " must be on a device of type ", device.name);
  check(s.backend == "auto" || s.backend == device.name, "backend ", s.backend, " is not there without Python; ",
        "export the model with backend=\"auto\" or \"", device.name, "\"");

  const int64_t element = static_cast<int64_t>(s.states.element_size());
  const int64_t whole = device.row_bytes > element ? device.row_bytes / element : 1;
  p.padding = (whole - p.hidden % whole) % whole;
  Readable readable(s.states, name, device, p.hidden, p.padding);
  p.lengths = readable.numbers(s.lengths, "lengths", {p.batch});
  p.offsets = readable.numbers(s.offsets, "offsets", {p.steps});
  p.resets = readable.flags(s.resets, "resets", rows);
  p.weight = readable.units(s.weight, "weight", {p.groups, p.hidden, p.hidden}, 2);
  p.state_in = readable.units(s.state_in, backward ? "grad_h_n" : "h0", state);
  (backward ? p.saved : p.in) = readable.units(s.states, name, shape);
  if (backward) p.in = readable.units(*s.grad_out, "grad_out", shape);
  if (units) {
    check(!outside || units->gain, "gain must be given in the form outside");
    p.skips = readable.scalars(units->skip, "skip", {p.groups, p.hidden});
    if (outside) p.gains = readable.scalars(*units->gain, "gain", {p.groups, p.hidden});
    if (outside && !backward) p.noise = readable.units(*units->noise, "noise", shape);
    if (p.form == Form::kCurrent && backward) p.initial = readable.units(*units->h0, "h0", state);
  }
  Written out(s.states, shape, split, p.padding), state_out(s.states, state, state, p.padding);
  Written aside(s.states, aside_shape, outside ? split : aside_shape, outside ? p.padding : 0);
  p.out = out.address();
  p.state_out = state_out.address();
  if (outside) p.aside = aside.address();
  p.hidden += p.padding;
  std::optional<Tensor> kept;
  const auto workspace = [&](int64_t bytes) {
    kept = torch::stable::new_empty(s.states, Shape{(bytes + element - 1) / element});
    return kept->data_ptr();
  };
  device.run(p, s.offsets ? rows[0] : p.steps * p.batch, s.states.get_device(), workspace);
  return {out.tensor(), state_out.tensor(), aside.tensor()};
}

}  // namespace fused_rin::operators
