"""csrc/bindings.cpp. Tensors are addresses of contiguous memory, 0 where there is none; nothing is checked here."""

# (T, B, G, D), and of a step (T, B, I, G, D)
_Sizes = tuple[int, int, int, int]
_StepSizes = tuple[int, int, int, int, int]
# (dtype, activation, backward, skip, num_reversed), and of a step (dtype, activation, skip); codes as in problem.py
_Rule = tuple[int, int, bool, float, int]
_StepRule = tuple[int, int, float]
# (lengths, offsets, resets)
_Rows = tuple[int, int, int]
# (weight, in, saved, state_in, out, state_out), see csrc/problem.h
_Sweep = tuple[int, int, int, int, int, int]
# (form, skips, gains, initial, noise, aside), likewise
_Units = tuple[int, int, int, int, int, int]
# (I, x, w_ih, b_ih, b_hh)
_Input = tuple[int, int, int, int, int]
# (w_ih, w_hh, b_ih, b_hh)
_Weights = tuple[int, int, int, int]

MAX_STEP_ROWS: int

def sweep(sizes: _Sizes, rule: _Rule, rows: _Rows, tensors: _Sweep, max_threads: int, isa: str, /) -> None: ...
def layer_forward(
    sizes: _Sizes, rule: _Rule, rows: _Rows, tensors: _Sweep, input: _Input, max_threads: int, isa: str, /
) -> None: ...
def layer_backward(
    sizes: _Sizes,
    rule: _Rule,
    rows: _Rows,
    tensors: _Sweep,
    input: _Input,
    h0: int,
    gradients: tuple[int, int, int, int, int],  # of x, w_ih, w_hh, b_ih, b_hh
    max_threads: int,
    isa: str,
    /,
) -> None: ...
def sweep_of_units(
    sizes: _Sizes, rule: _Rule, rows: _Rows, tensors: _Sweep, units: _Units, max_threads: int, isa: str, /
) -> None: ...
def layer_forward_of_units(
    sizes: _Sizes,
    rule: _Rule,
    rows: _Rows,
    tensors: _Sweep,
    units: _Units,
    input: _Input,
    max_threads: int,
    isa: str,
    /,
) -> None: ...
def layer_backward_of_units(
    sizes: _Sizes,
    rule: _Rule,
    rows: _Rows,
    tensors: _Sweep,
    units: _Units,
    input: _Input,
    h0: int,
    states: int,
    gradients: tuple[int, int, int, int, int],
    grad_skips: int,
    grad_gains: int,
    max_threads: int,
    isa: str,
    /,
) -> None: ...
def layer_forward_deep(
    sizes: _Sizes,
    rule: _Rule,
    rows: _Rows,
    tensors: _Sweep,
    input: _Input,
    deep: tuple[int, int, int, int],  # K, rows, inner, b_deep
    max_threads: int,
    isa: str,
    /,
) -> None: ...
def layer_backward_deep(
    sizes: _Sizes,
    rule: _Rule,
    rows: _Rows,
    tensors: _Sweep,
    input: _Input,
    h0: int,
    gradients: tuple[int, int, int, int, int],
    deep: tuple[int, int, int, int],  # K, rows, inner, grad_b_deep
    max_threads: int,
    isa: str,
    /,
) -> None: ...
def layer_forward_of_span(
    sizes: _Sizes,
    rule: _Rule,
    rows: _Rows,
    tensors: _Sweep,
    units: _Units,
    input: _Input,
    max_threads: int,
    isa: str,
    /,
) -> None: ...
def layer_backward_of_span(
    sizes: _Sizes,
    rule: _Rule,
    rows: _Rows,
    tensors: _Sweep,
    units: _Units,
    input: _Input,
    h0: int,
    states: int,
    gradients: tuple[int, int, int, int, int],
    grad_skips: int,
    grad_gains: int,
    sums: tuple[int, int, bool, bool],  # memory, blocks, continues, goes_on
    max_threads: int,
    isa: str,
    /,
) -> None: ...
def sums_of_spans(sizes: _Sizes, inputs: int, dtype: int, isa: str, /) -> int: ...
def spans(sizes: _Sizes, rule: _Rule, rows: _Rows, least: int, /) -> list[int]: ...
def step(
    sizes: _StepSizes,
    rule: _StepRule,
    weights: _Weights,
    x: int,
    h: int,
    out: int,
    h_n: int,
    max_threads: int,
    isa: str,
    /,
) -> None: ...
def plan(sizes: _Sizes, inputs: int, dtype: int, max_threads: int, isa: str, /) -> dict[str, int | str]: ...
def prefer_huge_pages(memory: int, bytes: int, /) -> None: ...
def has_torchs_threads() -> bool: ...
def use_torchs_threads(use: bool, /) -> None: ...
def processor_quota(root: str, /) -> float: ...
def assume_processors(count: int, /) -> None: ...
def found_crowded() -> None: ...
def forget_crowds() -> None: ...
def end_teams_at(meeting: int, /) -> None: ...
def isas() -> list[str]: ...
