"""The sweep: one loop over time with two epilogues, as one Triton kernel.

Names: `p_` a pointer, `o_` offsets along an axis, `b_` a block in registers. State tiles lie as [hidden, batch], so
that U is the *left* operand of `tl.dot`: the batch then pads to 8 columns instead of 16 rows, and Hopper's wgmma takes
U from registers.

Step n of the sweep is time t = n, or T-1-n where the sweep descends. With x_n the state (forward) or the gradient of
pre (backward) and M = U (forward) or U^T (backward), every iteration is

    c = M x_{n-1} + skip * x_{n-1}        the product on tensor cores, the skip added in its float32 accumulator
    x_n = act(pre_t + c)                  forward
    x_n = (grad_out_t + c) * act'(h_t)    backward, where one more iteration leaves c = the gradient of h0

With FORM, units have factors of their own (csrc/problem.h). What M multiplies, b_f, may then differ from x, which is
carried: in currents act(x); outside, backward, the gradient of pre, where x is that of the state.

A program owns TILE_N rows of M and TILE_B sequences of one recurrence, and keeps float32 x in registers. If TILE_N
covers the hidden size (plan "block"), nothing is shared. Otherwise (plan "sliced") the programs of a tile exchange
x, rounded to the tensors' dtype, through L2 and meet at a barrier once a step.
"""

import triton
import triton.language as tl


@triton.jit
def _tanh(x):
    """Portable tanh (libdevice's is CUDA's alone), accurate to about 2 ulp over the whole line, NaN kept.

    Near zero 1 - 2/(e^2x + 1) would cancel, so |x| < 0.625 takes an odd polynomial (our own least-squares fit, relative
    error 5e-9); beyond, 2/(e^2x + 1) < 0.45 and the subtraction is harmless.
    """
    z = x * x
    p = -0.0056792995892465115
    p = p * z + 0.020618118345737457
    p = p * z - 0.05373399704694748
    p = p * z + 0.1333138346672058
    p = p * z - 0.3333328068256378
    near = x + x * z * p
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def _activate(b_a, ACTIVATION: tl.constexpr):
    if ACTIVATION == "none":
        return b_a
    if ACTIVATION == "relu":
        return tl.where(b_a <= 0, 0.0, b_a)  # keeps NaN, unlike max.f32
    if ACTIVATION == "leaky_relu":
        return tl.where(b_a > 0, b_a, 0.01 * b_a)
    if ACTIVATION == "tanh":
        return _tanh(b_a)
    b_e = tl.exp(-tl.abs(b_a))
    if ACTIVATION == "sigmoid":
        return tl.where(b_a < 0, b_e, 1.0) / (1.0 + b_e)
    # softplus: max(a, 0) + log(1 + e); where e is small its series, which 1 + e would cut off.
    b_series = b_e * (1.0 - b_e * (0.5 - b_e * (0.3333333333 - 0.25 * b_e)))
    return tl.where(b_a <= 0, 0.0, b_a) + tl.where(b_e < 0.01, b_series, tl.log(1.0 + b_e))


@triton.jit
def _back(b_g, b_y, ACTIVATION: tl.constexpr):
    """The gradient of a from that of y = act(a), by y alone."""
    if ACTIVATION == "none":
        return b_g
    if ACTIVATION == "relu":
        return tl.where(b_y <= 0, 0.0, b_g)  # a NaN output lets its gradient through, as in torch
    if ACTIVATION == "leaky_relu":
        return tl.where(b_y > 0, b_g, 0.01 * b_g)
    if ACTIVATION == "tanh":
        return b_g * (1.0 - b_y * b_y)
    if ACTIVATION == "sigmoid":
        return b_g * (b_y * (1.0 - b_y))
    b_series = b_y * (1.0 - b_y * (0.5 - b_y * 0.1666666667))
    return b_g * tl.where(b_y < 0.01, b_series, 1.0 - tl.exp(-b_y))


@triton.jit
def _back_at(b_g, b_a, ACTIVATION: tl.constexpr):
    """The same by a itself."""
    if ACTIVATION == "softplus":
        return b_g * _activate(b_a, "sigmoid")
    if ACTIVATION == "tanh" or ACTIVATION == "sigmoid":
        return _back(b_g, _activate(b_a, ACTIVATION), ACTIVATION)
    return _back(b_g, b_a, ACTIVATION)


@triton.jit
def _first_row(n, steps, batch, ascending, p_offsets):
    """Row of sequence 0 at step n, in 64 bits; n beyond the last step reads the last one's."""
    n = tl.minimum(n, steps - 1)
    t = tl.where(ascending, n, steps - 1 - n)
    row = t.to(tl.int64) * batch
    if p_offsets is not None:
        row = tl.load(p_offsets + t)
    return row


@triton.jit
def _load_step(
    n, row, steps, ascending, row_size, o_b, o_tile, m_state, b_length, batch,
    p_in, p_saved, p_lengths, p_resets, BACKWARD: tl.constexpr,
):  # fmt: skip
    """What step n reads: which sequences are active in it, its input tile, the saved output, resets."""
    b_active = o_b < tl.where(n < steps, batch, 0)
    if p_lengths is not None:
        b_active &= tl.where(ascending, n, steps - 1 - n) < b_length
    m = m_state & b_active[None, :]
    b_in = tl.zeros(o_tile.shape, tl.float32)
    if p_in is not None:
        b_in = tl.load(p_in + row * row_size + o_tile, mask=m, other=0.0)
    b_saved = b_in
    if BACKWARD:
        b_saved = tl.load(p_saved + row * row_size + o_tile, mask=m, other=0.0)
    b_reset = b_active
    if p_resets is not None:
        b_reset = tl.load(p_resets + row + o_b, mask=b_active, other=0) != 0
    return b_active, b_in, b_saved, b_reset


@triton.jit
def _meet(p_arrived, expected):
    """Barrier between the programs of one tile; all of them are resident (cooperative launch), or it would not end.

    The counter only grows, so a late program cannot miss the value it waits for. `debug_barrier` orders this program's
    stores before its release; the acquire orders the others' stores before our loads.
    """
    tl.debug_barrier()
    seen = tl.atomic_add(p_arrived, 1, sem="acq_rel", scope="gpu") + 1
    while seen < expected:
        seen = tl.atomic_add(p_arrived, 0, sem="acquire", scope="gpu")


@triton.jit
def _load_matrix(p_u, o_n, o_k, D, BACKWARD: tl.constexpr):
    """A tile of M [n, k], or [split, n, k] for o_k [split, k]; padding is zero.

    The mask is applied by `where` rather than by the load alone: a dot operand that comes straight from a load is put
    into shared memory on Hopper, and wgmma would read it from there in every step instead of from registers.
    """
    p = o_k * D + o_n if BACKWARD else o_n * D + o_k
    m = (o_n < D) & (o_k < D)
    return tl.where(m, tl.load(p_u + p, mask=m, other=0.0), 0.0)


@triton.jit
def _sum_parts(b_parts, SPLIT_K: tl.constexpr, TILE_N: tl.constexpr, TILE_B: tl.constexpr):
    """The sum over the first axis, up to 8 parts of as many warps, by halves.

    The halves that `split` makes lie in one thread, so all parts are brought together once; tl.sum's way over warps
    passes 8 to 20 barriers more (NOTES.md).
    """
    b_sum = tl.permute(b_parts, (1, 2, 0))
    for i in tl.static_range(3):
        if (SPLIT_K >> i) > 1:
            b_left, b_right = tl.split(tl.reshape(b_sum, (TILE_N, TILE_B, SPLIT_K >> (i + 1), 2)))
            b_sum = b_left + b_right
    return tl.reshape(b_sum, (TILE_N, TILE_B))


@triton.jit(do_not_specialize=["steps", "batch", "groups", "num_reversed", "first_tile"])
def sweep(
    p_in,  # [rows, G, D] pre, or the gradient of out (None: zero)
    p_saved,  # [rows, G, D] out, read by the backward sweep
    p_state_in,  # [B, G, D] h0, or the gradient of h_n (None: zero)
    p_u,  # [G, D, D]
    p_out,  # [rows, G, D] out, or the gradient of pre
    p_state_out,  # [B, G, D] h_n, or the gradient of h0
    p_lengths,  # [B] int64, or None
    p_offsets,  # [T] int64 for packed sequences, or None
    p_resets,  # [rows] uint8, or None
    p_exchange,  # [2, B, G, D] in the plan "sliced": x of this step and of the one before
    p_arrived,  # [tiles, 16] int64 zeros in the plan "sliced": one counter a tile, each in a cache line of its own
    p_skips,  # [G, D] float32, with a FORM: s of each unit, in place of `skip`
    p_gains,  # [G, D] float32, outside: a of each unit
    p_initial,  # [B, G, D] h0, or None: currents, backward
    p_noise,  # [rows, G, D] added to the state, or None: outside, forward
    p_aside,  # [rows, G, D], or None: outside, act(..), or the gradient of the state
    steps, batch, groups, num_reversed, first_tile, D, skip,
    TILE_N: tl.constexpr, TILE_B: tl.constexpr,
    SPLIT_K: tl.constexpr, TILE_K: tl.constexpr,
    SLICED: tl.constexpr, MATRIX: tl.constexpr,
    BACKWARD: tl.constexpr, ACTIVATION: tl.constexpr, HAS_SKIP: tl.constexpr, PRECISION: tl.constexpr,
    FORM: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    tile = first_tile + tl.program_id(0)
    g = tile % groups
    ascending = (g < groups - num_reversed) != BACKWARD
    o_n = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    first_b = (tile // groups) * TILE_B
    o_b = first_b + tl.arange(0, TILE_B)
    m_state = (o_n[:, None] < D) & (o_b[None, :] < batch)
    dtype = p_u.dtype.element_ty

    # 64-bit offsets are scalars and move the pointers; within a tile 32 bits do, at half the registers.
    row_size = groups.to(tl.int64) * D
    first = first_b * row_size + g * D
    o_tile = tl.arange(0, TILE_B)[None, :] * (groups * D) + o_n[:, None]
    p_u += g.to(tl.int64) * D * D
    p_out += first
    p_state_out += first
    if p_in is not None:
        p_in += first
    if BACKWARD:
        p_saved += first

    b_length = o_b  # only read where there are lengths
    if p_lengths is not None:
        b_length = tl.load(p_lengths + o_b, mask=o_b < batch, other=0)
        b_length = tl.minimum(b_length, steps).to(tl.int32)

    if FORM is not None:
        b_s = tl.load(p_skips + g * D + o_n, mask=o_n < D, other=0.0)[:, None]
    if FORM == "outside":
        b_gain = tl.load(p_gains + g * D + o_n, mask=o_n < D, other=0.0)[:, None]
        if p_noise is not None:
            p_noise += first
        if p_aside is not None:
            p_aside += first
    b_h0 = tl.zeros((TILE_N, TILE_B), tl.float32)
    if p_initial is not None:
        b_h0 = tl.load(p_initial + first + o_tile, mask=m_state, other=0.0).to(tl.float32)

    b_x = tl.zeros((TILE_N, TILE_B), tl.float32)
    b_d = tl.zeros((TILE_N, TILE_B), tl.float32)  # outside, backward: the gradient of pre
    b_c = tl.zeros((TILE_N, TILE_B), tl.float32)
    if p_state_in is not None:
        b_state = tl.load(p_state_in + first + o_tile, mask=m_state, other=0.0).to(tl.float32)
        if BACKWARD:
            b_c = b_state
        else:
            b_x = b_state

    # M stays on chip for the whole sequence. `pin` is never true. It is there because Triton moves the operand of a
    # single dot into the loop, which then reads M from shared memory in every step (256 clocks at D = 128 in
    # bfloat16, as long as the rest of the step); an operand with a second use is left in registers.
    pin = steps < 0
    if SLICED:
        o_k = tl.arange(0, SPLIT_K)[:, None, None] * TILE_K + tl.arange(0, TILE_K)[None, None, :]
        o_xk = tl.arange(0, SPLIT_K)[:, None, None] * TILE_K + tl.arange(0, TILE_K)[None, :, None]
        o_x = tl.arange(0, TILE_B)[None, None, :] * (groups * D) + o_xk
        p_exchange += first
        p_arrived += tl.program_id(0) * 16
        everyone = tl.num_programs(1).to(tl.int64)
        if MATRIX == "registers":
            b_m = _load_matrix(p_u, o_n[None, :, None], o_k, D, BACKWARD)
            b_zero = tl.zeros((SPLIT_K, TILE_K, TILE_B), dtype)
            b_x = tl.where(pin, tl.sum(tl.dot(b_m, b_zero, input_precision=PRECISION), 0), b_x)
    else:
        b_m = _load_matrix(p_u, o_n[:, None], tl.arange(0, TILE_K)[None, :], D, BACKWARD)
        if MATRIX == "registers":
            b_x = tl.where(pin, tl.dot(b_m, b_x.to(dtype), input_precision=PRECISION), b_x)

    # Loads run one step ahead of their use; `row` two ahead, since for packed sequences it is itself loaded.
    row = _first_row(0, steps, batch, ascending, p_offsets)
    row_1 = _first_row(1, steps, batch, ascending, p_offsets)
    b_active, b_in, b_saved, b_reset = _load_step(
        0, row, steps, ascending, row_size, o_b, o_tile, m_state, b_length, batch,
        p_in, p_saved, p_lengths, p_resets, BACKWARD,
    )  # fmt: skip
    b_moved = o_b < 0  # was active in the step before; before the first one nothing was
    b_reset_before = o_b < 0

    iterations = steps
    if BACKWARD:
        iterations += 1
    for n in tl.range(0, iterations, num_stages=1, loop_unroll_factor=UNROLL):
        row_2 = _first_row(n + 2, steps, batch, ascending, p_offsets)
        b_active_1, b_in_1, b_saved_1, b_reset_1 = _load_step(
            n + 1, row_1, steps, ascending, row_size, o_b, o_tile, m_state, b_length, batch,
            p_in, p_saved, p_lengths, p_resets, BACKWARD,
        )  # fmt: skip

        # No state crosses the start of an episode, which lies before row t: this one ascending, the last descending.
        # With a FORM it is dropped before the product, since act(0) need not be 0; else the product is, after it.
        if FORM is not None and p_resets is not None:
            b_crossed = tl.where(ascending, b_reset, b_reset_before)
            b_x = tl.where(b_crossed[None, :], 0.0, b_x)
            b_d = tl.where(b_crossed[None, :], 0.0, b_d)

        # c = M f + skip * x
        b_f = b_x
        if FORM == "current" and not BACKWARD:
            b_f = tl.where(m_state, _activate(b_x, ACTIVATION), 0.0)
        if FORM == "outside" and BACKWARD:
            b_f = b_d
        b_skip = tl.zeros((TILE_N, TILE_B), tl.float32)
        if HAS_SKIP:  # a skip of 0 must not make 0 * inf
            b_skip = b_x * skip
        if FORM is not None:
            b_skip = b_x * b_s
        # Where the product alone is needed, the skip is added later.
        apart = FORM is not None and FORM != "inside" and (FORM == "outside") != BACKWARD
        b_start = b_skip
        if apart:
            b_start = tl.zeros((TILE_N, TILE_B), tl.float32)
        if SLICED:
            # Two buffers need one barrier: who writes a buffer again has passed the next barrier, and so has everyone
            # read what it held. Loads bypass L1, which does not see the other programs' stores.
            p_step = p_exchange + (n % 2) * batch * row_size
            tl.store(p_step + o_tile, b_f.to(dtype), mask=m_state)
            _meet(p_arrived, everyone * (n + 1))
            b_sum = tl.zeros((SPLIT_K, TILE_N, TILE_B), tl.float32)
            if MATRIX == "registers":
                m_x = (o_xk < D) & (o_b[None, None, :] < batch)
                b_all = tl.load(p_step + o_x, mask=m_x, other=0.0, cache_modifier=".cg")
                b_sum = tl.dot(b_m, b_all, b_sum, input_precision=PRECISION)
            else:
                for k in tl.range(0, D, SPLIT_K * TILE_K, num_stages=1):
                    m_x = (k + o_xk < D) & (o_b[None, None, :] < batch)
                    b_all = tl.load(p_step + o_x + k, mask=m_x, other=0.0, cache_modifier=".cg")
                    b_u = _load_matrix(p_u, o_n[None, :, None], k + o_k, D, BACKWARD)
                    b_sum = tl.dot(b_u, b_all, b_sum, input_precision=PRECISION)
            b_new = _sum_parts(b_sum, SPLIT_K, TILE_N, TILE_B) + b_start
        else:
            b_new = tl.dot(b_m, b_f.to(dtype), b_start, input_precision=PRECISION)
            b_new = tl.where(m_state, b_new, 0.0)  # padding: 0 * inf would spread NaN from there
        if FORM == "current" and BACKWARD:
            b_entered = tl.where(b_active[None, :], b_saved.to(tl.float32), b_h0)
            b_new = _back_at(b_new, b_entered, ACTIVATION) + b_skip
        if FORM is None and p_resets is not None:
            b_crossed = tl.where(ascending, b_reset, b_reset_before)
            b_new = tl.where(b_crossed[None, :], 0.0, b_new)
        if BACKWARD:
            moved = n > 0 if p_lengths is None else b_moved[None, :]
            b_c = tl.where(moved, b_new, b_c)
        else:
            b_c = b_new

        b_y = b_in.to(tl.float32) + b_c
        if FORM == "outside":
            m_step = m_state & (o_b < tl.where(n < steps, batch, 0))[None, :]
            if p_offsets is not None:
                m_step &= b_active[None, :]
            if BACKWARD:
                b_aside = tl.where(b_active[None, :], b_y, 0.0)
                b_y = _back(b_gain * b_y, b_saved.to(tl.float32), ACTIVATION)
                b_d = tl.where(b_active[None, :], b_y, 0.0)
            else:
                b_z = _activate(b_y, ACTIVATION)
                b_aside = tl.where(b_active[None, :], b_z, 0.0)
                b_y = b_skip + b_gain * b_z
                if p_noise is not None:
                    b_y += tl.load(p_noise + row * row_size + o_tile, mask=m_step & b_active[None, :], other=0.0).to(
                        tl.float32
                    )
            if p_aside is not None:
                tl.store(p_aside + row * row_size + o_tile, b_aside.to(dtype), mask=m_step)
        elif FORM != "current":
            b_y = _back(b_y, b_saved.to(tl.float32), ACTIVATION) if BACKWARD else _activate(b_y, ACTIVATION)
        if FORM == "outside" and BACKWARD:
            b_x = b_aside  # the gradient of the state, carried
            b_y = b_d
        elif p_lengths is None:
            b_x = b_y
        elif BACKWARD:
            b_x = tl.where(b_active[None, :], b_y, 0.0)
            b_y = b_x
        else:
            b_x = tl.where(b_active[None, :], b_y, b_x)
            b_y = tl.where(b_active[None, :], b_y, 0.0)
        m_out = m_state
        if p_offsets is not None:  # a packed batch has no row for a sequence that has ended
            m_out = m_state & b_active[None, :]
        elif BACKWARD:  # nor is there a row for the last iteration
            m_out = m_state & (o_b < tl.where(n < steps, batch, 0))[None, :]
        tl.store(p_out + row * row_size + o_tile, b_y.to(dtype), mask=m_out)

        b_moved = b_active
        b_reset_before = b_reset
        b_active, b_in, b_saved, b_reset = b_active_1, b_in_1, b_saved_1, b_reset_1
        row = row_1
        row_1 = row_2

    if BACKWARD:
        tl.store(p_state_out + o_tile, b_c.to(dtype), mask=m_state)
    else:
        tl.store(p_state_out + o_tile, b_x.to(dtype), mask=m_state)
