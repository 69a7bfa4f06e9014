// Runs a model that holds RINs in a process without Python.
//
//     run MODEL INPUT OUTPUT DEVICE LIBRARY...
//
// MODEL     traced (.pt, torch.jit.save) or compiled ahead of time (.pt2, torch._inductor.aoti_compile_and_package)
// INPUT     a tensor, by torch.save; OUTPUT is written so that torch.load reads it, a tuple of tensors
// DEVICE    cpu or cuda
// LIBRARY   libfused_rin_operators.so, and for CUDA libfused_rin_operators_cuda.so after it; in Python
//           fused_rin.operator_library("cpu") and ("cuda") are their paths
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/import.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <fstream>
#include <iostream>
#include <iterator>
#include <string>
#include <vector>

namespace {

std::vector<at::Tensor> tensors_of(const c10::IValue& value) {
  if (value.isTensor()) return {value.toTensor()};
  std::vector<at::Tensor> tensors;
  for (const c10::IValue& element : value.toTupleRef().elements()) tensors.push_back(element.toTensor());
  return tensors;
}

std::vector<at::Tensor> run(const std::string& model, const at::Tensor& input) {
  const c10::InferenceMode no_gradients;
  if (model.size() > 4 && model.substr(model.size() - 4) == ".pt2")
    return torch::inductor::AOTIModelPackageLoader(model).run({input});
  torch::jit::Module module = torch::jit::load(model, input.device());
  module.eval();
  return tensors_of(module.forward({input}));
}

}  // namespace

int main(int count, char** arguments) try {
  if (count < 6) {
    std::cerr << "usage: run MODEL INPUT OUTPUT cpu|cuda LIBRARY...\n";
    return 2;
  }
  const std::string model = arguments[1], device = arguments[4];
  // Before the model is loaded: it names the operators that these register. A program can as well be linked with them.
  for (int i = 5; i < count; ++i)
    if (!dlopen(arguments[i], RTLD_NOW | RTLD_LOCAL)) throw std::runtime_error(dlerror());

  std::ifstream file(arguments[2], std::ios::binary);
  if (!file) throw std::runtime_error(std::string("cannot read ") + arguments[2]);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  const at::Tensor input = torch::jit::pickle_load(bytes).toTensor().to(at::Device(device));

  const std::vector<at::Tensor> output = run(model, input);
  for (const at::Tensor& tensor : output) std::cout << tensor.sizes() << " " << tensor.sum().item<double>() << "\n";
  std::vector<c10::IValue> on_cpu;
  for (const at::Tensor& tensor : output) on_cpu.emplace_back(tensor.cpu().contiguous());
  const std::vector<char> written = torch::jit::pickle_save(c10::ivalue::Tuple::create(std::move(on_cpu)));
  std::ofstream(arguments[3], std::ios::binary).write(written.data(), static_cast<std::streamsize>(written.size()));
  return 0;
} catch (const std::exception& error) {
  std::cerr << error.what() << "\n";
  return 1;
}
