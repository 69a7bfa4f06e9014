// oneDNN's vanilla_rnn primitive for one network of fixed sizes, behind a C interface (oneDNN 3.x).
//
// Inference packs the weights once. A training step packs them anew, forward and backward, since an optimizer would
// have changed them, and clears the weight gradients, which the primitive adds to.
#include <omp.h>

#include <cstring>
#include <exception>
#include <memory>
#include <oneapi/dnnl/dnnl.hpp>
#include <unordered_map>
#include <vector>

namespace {

using dnnl::memory;
using dnnl::prop_kind;
using Tag = memory::format_tag;
using Type = memory::data_type;
using Desc = memory::desc;

// In the order of the caller's fields.
struct Sizes {
  int64_t steps, batch, inputs, hidden, layers, directions;
  int64_t tanh, bf16, training, state, batch_first, threads;
};

// Dense, in oneDNN's plain order: weights [layers, directions, in, 1, hidden], bias [layers, directions, 1, hidden],
// states [layers, directions, batch, hidden]; x and out as the caller has them. Gradients are float32.
struct Given {
  void *x, *state, *out, *grad;
  void *input_weights, *weights, *bias;
  float *x_grad, *input_weights_grad, *weights_grad, *bias_grad;
};

class Network {
 public:
  Network(const Sizes& s, const Given& given)
      : s_(s), given_(given), engine_(dnnl::engine::kind::cpu, 0), stream_(engine_) {
    Type type = s.bf16 ? Type::bf16 : Type::f32;
    Tag layer_tag = s.batch_first ? Tag::ntc : Tag::tnc;
    memory::dims x{s.steps, s.batch, s.inputs}, out{s.steps, s.batch, s.directions * s.hidden};
    memory::dims wx{s.layers, s.directions, s.inputs, 1, s.hidden}, wh{s.layers, s.directions, s.hidden, 1, s.hidden};
    memory::dims bias{s.layers, s.directions, 1, s.hidden}, state{s.layers, s.directions, s.batch, s.hidden};

    auto kind = s.training ? prop_kind::forward_training : prop_kind::forward_inference;
    auto act = s.tanh ? dnnl::algorithm::eltwise_tanh : dnnl::algorithm::eltwise_relu;
    auto way =
        s.directions == 2 ? dnnl::rnn_direction::bidirectional_concat : dnnl::rnn_direction::unidirectional_left2right;
    Desc x_desc(x, type, layer_tag), out_desc(out, type, layer_tag), bias_desc(bias, Type::f32, Tag::ldgo);
    Desc state_desc = s.state ? Desc(state, type, Tag::ldnc) : Desc();
    Desc wx_any(wx, type, Tag::any), wh_any(wh, type, Tag::any);
    dnnl::vanilla_rnn_forward::primitive_desc forward(engine_, kind, act, way, x_desc, state_desc, wx_any, wh_any,
                                                      bias_desc, out_desc, Desc());
    forward_ = dnnl::vanilla_rnn_forward(forward);
    x_ = memory(x_desc, engine_, given.x);
    out_ = memory(out_desc, engine_, given.out);
    bias_ = memory(bias_desc, engine_, given.bias);
    wx_ = memory(Desc(wx, type, Tag::ldigo), engine_, given.input_weights);
    wh_ = memory(Desc(wh, type, Tag::ldigo), engine_, given.weights);
    forward_wx_ = memory(forward.weights_layer_desc(), engine_);
    forward_wh_ = memory(forward.weights_iter_desc(), engine_);
    arguments_ = {{DNNL_ARG_SRC_LAYER, x_},
                  {DNNL_ARG_WEIGHTS_LAYER, forward_wx_},
                  {DNNL_ARG_WEIGHTS_ITER, forward_wh_},
                  {DNNL_ARG_BIAS, bias_},
                  {DNNL_ARG_DST_LAYER, out_}};
    if (s.state) {
      state_ = memory(state_desc, engine_, given.state);
      arguments_.insert({DNNL_ARG_SRC_ITER, state_});
    }
    if (!s.training) {
      pack(forward_wx_, forward_wh_);
      stream_.wait();
      return;
    }

    workspace_ = memory(forward.workspace_desc(), engine_);
    arguments_.insert({DNNL_ARG_WORKSPACE, workspace_});
    Desc grad_x(x, Type::f32, layer_tag), grad_out(out, Type::f32, layer_tag);
    Desc grad_state = s.state ? Desc(state, Type::f32, Tag::ldnc) : Desc();
    Desc grad_wx(wx, Type::f32, Tag::any), grad_wh(wh, Type::f32, Tag::any);
    dnnl::vanilla_rnn_backward::primitive_desc backward(engine_, prop_kind::backward, act, way, x_desc, state_desc,
                                                        wx_any, wh_any, bias_desc, out_desc, Desc(), grad_x, grad_state,
                                                        grad_wx, grad_wh, bias_desc, grad_out, Desc(), forward);
    backward_ = dnnl::vanilla_rnn_backward(backward);
    backward_wx_ = memory(backward.weights_layer_desc(), engine_);
    backward_wh_ = memory(backward.weights_iter_desc(), engine_);
    wx_grad_ = memory(Desc(wx, Type::f32, Tag::ldigo), engine_, given.input_weights_grad);
    wh_grad_ = memory(Desc(wh, Type::f32, Tag::ldigo), engine_, given.weights_grad);
    own_wx_grad_ = like(backward.diff_weights_layer_desc(), wx_grad_);
    own_wh_grad_ = like(backward.diff_weights_iter_desc(), wh_grad_);
    bias_grad_ = memory(bias_desc, engine_, given.bias_grad);
    backward_arguments_ = {{DNNL_ARG_SRC_LAYER, x_},
                           {DNNL_ARG_WEIGHTS_LAYER, backward_wx_},
                           {DNNL_ARG_WEIGHTS_ITER, backward_wh_},
                           {DNNL_ARG_BIAS, bias_},
                           {DNNL_ARG_DST_LAYER, out_},
                           {DNNL_ARG_WORKSPACE, workspace_},
                           {DNNL_ARG_DIFF_SRC_LAYER, memory(grad_x, engine_, given.x_grad)},
                           {DNNL_ARG_DIFF_WEIGHTS_LAYER, own_wx_grad_},
                           {DNNL_ARG_DIFF_WEIGHTS_ITER, own_wh_grad_},
                           {DNNL_ARG_DIFF_BIAS, bias_grad_},
                           {DNNL_ARG_DIFF_DST_LAYER, memory(grad_out, engine_, given.grad)}};
    if (s.state) {
      backward_arguments_.insert({DNNL_ARG_SRC_ITER, state_});
      backward_arguments_.insert({DNNL_ARG_DIFF_SRC_ITER, memory(grad_state, engine_)});
    }
  }

  void run() {
    if (s_.training) pack(forward_wx_, forward_wh_);
    forward_.execute(stream_, arguments_);
    if (s_.training) {
      pack(backward_wx_, backward_wh_);
      for (const memory& m : {own_wx_grad_, own_wh_grad_, bias_grad_}) {
        std::memset(m.get_data_handle(), 0, m.get_desc().get_size());
      }
      backward_.execute(stream_, backward_arguments_);
      hand_out(own_wx_grad_, wx_grad_);
      hand_out(own_wh_grad_, wh_grad_);
    }
    stream_.wait();
  }

 private:
  void pack(memory& wx, memory& wh) {
    dnnl::reorder(wx_, wx).execute(stream_, wx_, wx);
    dnnl::reorder(wh_, wh).execute(stream_, wh_, wh);
  }

  // The caller's memory itself where it has the layout that is wanted.
  memory like(const Desc& wanted, const memory& callers) {
    return callers.get_desc() == wanted ? callers : memory(wanted, engine_);
  }

  void hand_out(memory& own, memory& callers) {
    if (own.get_data_handle() != callers.get_data_handle()) dnnl::reorder(own, callers).execute(stream_, own, callers);
  }

  Sizes s_;
  Given given_;
  dnnl::engine engine_;
  dnnl::stream stream_;
  dnnl::primitive forward_, backward_;
  memory x_, out_, bias_, state_, wx_, wh_, forward_wx_, forward_wh_, backward_wx_, backward_wh_, workspace_;
  memory wx_grad_, wh_grad_, own_wx_grad_, own_wh_grad_, bias_grad_;
  std::unordered_map<int, memory> arguments_, backward_arguments_;
};

template <class F>
int guarded(char* text, int64_t size, F&& work) {
  try {
    work();
    return 0;
  } catch (const std::exception& error) {
    std::strncpy(text, error.what(), size - 1);
    return 1;
  }
}

}  // namespace

// Each returns 0, or 1 with the reason in `text`, which has `size` characters.
extern "C" {

int rnn_create(const Sizes* sizes, const Given* given, void** network, char* text, int64_t size) {
  return guarded(text, size, [&] {
    omp_set_num_threads(static_cast<int>(sizes->threads));
    *network = new Network(*sizes, *given);
  });
}

int rnn_run(void* network, char* text, int64_t size) {
  return guarded(text, size, [&] { static_cast<Network*>(network)->run(); });
}

void rnn_delete(void* network) { delete static_cast<Network*>(network); }

void rnn_version(int32_t numbers[3]) {
  const dnnl_version_t* version = dnnl_version();
  numbers[0] = version->major, numbers[1] = version->minor, numbers[2] = version->patch;
}
}
