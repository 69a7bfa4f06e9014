"""Who is looking at a call, and so which way it takes: the one place where that is decided.

    DIRECT     nobody: tensors are handed to a kernel as addresses, past torch's dispatcher (6 us a call)
    OPERATOR   somebody records operators, or a tensor's numbers do not lie where it says: `torch.ops.fused_rin`, which
               compilers and tracers keep whole and for which the dispatcher resolves what is lazy
    REFERENCE  derivatives that no kernel has: vmap, forward mode, batched gradients, gradients of gradients

A kernel that wrote behind a recorder's back would be missing from the record, silently; so a new kind of observer
belongs here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._device import DeviceContext

DIRECT, OPERATOR, REFERENCE = "direct", "operator", "reference"

# Looked up once: together the look-ups would cost as much as the arithmetic of a step of 64 units.
_dispatch_modes = torch._C._len_torch_dispatch_stack
function_modes = torch._C._is_torch_function_mode_enabled
_function_modes_there = torch._C._len_torch_function_stack
_function_mode = torch._C._get_function_stack_at
without_function_modes = torch._C.DisableTorchFunction
_tracing_state = torch._C._get_tracing_state
_autocast = torch._C._is_any_autocast_enabled
_transforms = torch._C._are_functorch_transforms_active
_forward_ad = torch.autograd.forward_ad
_is_legacy_batched = torch._C._functorch.is_legacy_batchedtensor

PLAIN = frozenset({Tensor, torch.nn.Parameter})  # types of tensors that hide nothing behind another
_PASSED_BY = PLAIN | {type(None), list, tuple, bool}


def unobserved() -> bool:
    """Whether nobody looks, in 0.4 us; compilers are for the caller to ask about, in whose code they trace."""
    return (
        not (_dispatch_modes() or function_modes() or _transforms() or _autocast())
        and _tracing_state() is None
        and _forward_ad._current_level < 0
    )


def observer(product: bool = False) -> tuple[str, str] | None:
    """(way, who looks) for a call made now, or None. With `product`, autocast looks too: it casts matrix products."""
    if torch._C._are_functorch_transforms_active():
        return REFERENCE, "a transform of torch.func (vmap, grad, jvp) is active"
    if torch.compiler.is_compiling():
        return OPERATOR, "torch.compile or torch.export is at work"
    if _forward_ad._current_level >= 0:
        return REFERENCE, "forward-mode derivatives are active"
    if _tracing_state() is not None:
        return OPERATOR, "torch.jit.trace is at work"
    if _dispatch_modes():
        return OPERATOR, "a TorchDispatchMode is active"
    if function_modes() and not only_a_default_device():
        return OPERATOR, "a TorchFunctionMode is active"
    if product and _autocast():
        return OPERATOR, "autocast is on"
    return None


within_export_onnx = False  # set by onnx.export_onnx: not every release of torch says it of its newer exporter


def exporting_to_onnx() -> bool:
    """Whether torch.onnx.export is what compiles or traces."""
    if not torch.compiler.is_compiling() and _tracing_state() is None:
        return False
    return within_export_onnx or torch.onnx.is_in_onnx_export()


def keeps_graphs_whole() -> bool:
    """Whether a call is recorded or transformed step by step, by what has no hooks on saved tensors."""
    return _transforms() or _forward_ad._current_level >= 0 or _tracing_state() is not None


# An offset into memory that is not there (a slice of a freed storage) looks like an address. No offset is as large as
# this, a terabyte, and most addresses are larger.
ANY_OFFSET = 1 << 40


def address(tensor: Tensor) -> int:
    """Where the numbers of a tensor lie, 0 if they lie nowhere. RuntimeError if it has no storage."""
    place = tensor.data_ptr()
    return place if place > ANY_OFFSET or place != tensor.storage_offset() * tensor.itemsize else 0


def is_readable(tensor: Tensor) -> bool:
    """Whether a kernel may read the numbers where the tensor says they lie.

    Not those of subclasses, fake and functional tensors, other layouts, negated views (the sign is a flag of the
    tensor), and tensors whose memory is gone or was never there (a freed storage, an efficient zero tensor).
    """
    if type(tensor) not in PLAIN:
        return False
    try:
        return not tensor.is_neg() and (address(tensor) != 0 or not tensor.numel())
    except RuntimeError:  # what has no storage says so
        return False


def check_memory(*tensors: Tensor | None) -> None:
    """RuntimeError for a tensor whose memory was taken from it, which torch's own products would read all the same."""
    if torch.compiler.is_compiling():
        return
    for t in tensors:
        if t is None or type(t) not in PLAIN or t.layout is not torch.strided or t.device.type not in ("cpu", "cuda"):
            continue
        if not (is_readable(t) or t.is_neg() or t._is_zerotensor() or torch._is_functional_tensor(t)):
            try:
                taken = t.untyped_storage().nbytes() == 0
            except (RuntimeError, NotImplementedError):  # batched: others hold its numbers
                continue
            if taken:
                raise RuntimeError(
                    f"a tensor of shape {tuple(t.shape)} has no memory: its storage was freed (resize_(0), as sharding "
                    "does between uses)"
                )


def is_plain(tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    """Whether it is readable, of this dtype and shape, on the CPU, and not empty; in one look."""
    try:
        return (
            tensor.dtype is dtype
            and tensor.shape == shape
            and tensor.is_cpu
            and type(tensor) in PLAIN
            and not tensor.is_neg()
            and (tensor.data_ptr() > ANY_OFFSET or address(tensor) != 0)  # as a rule the former, in half the time
        )
    except RuntimeError:
        return False


def way(*tensors: Tensor | None, product: bool = False) -> str:
    """DIRECT, OPERATOR or REFERENCE for a call on these tensors made now."""
    if torch.compiler.is_compiling() or not unobserved():
        seen = observer(product)
        if seen is not None:
            return seen[0]
    for tensor in tensors:
        if tensor is not None and not is_readable(tensor):
            return REFERENCE if type(tensor) is Tensor and _is_legacy_batched(tensor) else OPERATOR
    return DIRECT


def way_back(*tensors: Tensor | None) -> str:
    """As `way`, for a backward: a graph of it is asked for where gradients are enabled, and the reference has one."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return REFERENCE
    return way(*tensors)


# torch.set_default_device stands on the stack of function modes for good, has nothing to say about a call that makes no
# tensor without naming a device, and makes every look at a tensor 1 us slower, `tensor.shape` included.


def only_a_default_device() -> bool:
    """Whether there are function modes, all of them torch.set_default_device's or `with torch.device(...)`."""
    if not function_modes():
        return False
    if _function_modes_there() == 1:  # as a rule; a generator takes 0.5 us
        return type(_function_mode(0)) is DeviceContext
    return all(type(_function_mode(i)) is DeviceContext for i in range(_function_modes_there()))


def may_be_passed_by(*tensors: Any) -> bool:
    """Whether function modes are on that a call on these (tensors, None or lists) may do without seeing.

    The caller then goes on under `without_function_modes()`.
    """
    if torch.compiler.is_compiling() or not only_a_default_device():
        return False
    return _PASSED_BY.issuperset(map(type, tensors))


def fx_leaf(module: Any, input: Any, hx: Any) -> Any:
    """torch.fx.symbolic_trace keeps torch.nn's modules whole, by their place; here its proxies are met and told so.

    A proxy for the call of `module`, or None if `input` is no proxy.
    """
    tracer = getattr(input, "tracer", None)
    if not isinstance(tracer, torch.fx.Tracer):
        return None
    arguments = (input,) if hx is None else (input, hx)
    return tracer.create_proxy("call_module", tracer.path_of_module(module), arguments, {})
