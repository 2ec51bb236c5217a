"""Grouped GEMM of mixture of experts: every expert's matrix times its rows, in one launch.

The assignments of expert e lie at places offsets[e] .. offsets[e + 1]; `offsets` begins at the first expert that is
here. Counted from there, tile number t belongs to the last expert with offsets[e] // BLOCK_M + e <= t: each expert owns
at least the tiles it needs, the grid is a fixed upper bound, and what is not needed leaves at once. Gathering rows is
part of the first product's loads, the gate part of its last lines, and nothing is ever padded or copied together.

A assignments, C channels, F features, E experts.
"""

from ..core.lang import tl, triton
from ..swiglu import activate


@triton.jit
def _tile_of_expert(tile, offsets, E, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    """(expert, first row of the tile, end of the expert's rows); empty tiles begin at the end."""
    number = tl.arange(0, BLOCK_E)
    start = tl.load(offsets)
    begins = tl.load(offsets + number, mask=number < E, other=0) - start
    owned = (number < E) & (begins // BLOCK_M + number <= tile)
    expert = tl.sum(owned.to(tl.int32), 0) - 1
    begin = tl.load(offsets + expert)
    local = (tile - (begin - start) // BLOCK_M - expert).to(tl.int64) * BLOCK_M
    return expert.to(tl.int64), begin + local, tl.load(offsets + expert + 1)


@triton.jit
def moe_grouped_gemm_swiglu_kernel(
    x, w, order, offsets, gate_up, h,
    E, C, F, columns, stride_xt, stride_xc, stride_we, stride_wf, stride_wc,
    TOP_K: tl.constexpr, ACTIVATION: tl.constexpr, SAVE: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grouped GEMM with gate: h = activation(x · W_gate) · (x · W_up), rows gathered from x; gate and up may be saved.

    A tile takes eight gates and their eight ups by turns, as `linear_swiglu` does: one product twice as wide reads the
    rows from shared memory once."""
    pid = tl.program_id(0)
    expert, first, end = _tile_of_expert(pid // columns, offsets, E, BLOCK_M, BLOCK_E)
    if first >= end:
        return
    place = first + tl.arange(0, BLOCK_M)
    column = (pid % columns).to(tl.int64) * BLOCK_N
    own = tl.arange(0, 2 * BLOCK_N)
    w_feature = column + own // 16 * 8 + own % 8
    token = (tl.load(order + place, mask=place < end, other=0) // TOP_K).to(tl.int64)
    channel = tl.arange(0, BLOCK_K)
    x_tile = x + token[:, None] * stride_xt + channel[None, :].to(tl.int64) * stride_xc
    w_row = w_feature + tl.where(own // 8 % 2 == 0, 0, tl.cast(F, tl.int64))
    w_tile = w + expert * stride_we + w_row[:, None] * stride_wf + channel[None, :].to(tl.int64) * stride_wc
    both = tl.zeros([BLOCK_M, 2 * BLOCK_N], tl.float32)
    for c in tl.range(0, C, BLOCK_K):
        inside = channel[None, :] < C - c
        step = tl.cast(c, tl.int64)
        rows = tl.load(x_tile + step * stride_xc, mask=(place[:, None] < end) & inside, other=0.0)
        matrix = tl.load(w_tile + step * stride_wc, mask=(w_feature[:, None] < F) & inside, other=0.0)
        both = tl.dot(rows, tl.trans(matrix), both, input_precision="ieee")
    gate, up = tl.split(tl.permute(tl.reshape(both, [BLOCK_M, BLOCK_N // 8, 2, 8]), [0, 1, 3, 2]))
    gate, up = tl.reshape(gate, [BLOCK_M, BLOCK_N]), tl.reshape(up, [BLOCK_M, BLOCK_N])
    feature = column + tl.arange(0, BLOCK_N)
    mask = (place[:, None] < end) & (feature[None, :] < F)
    at = place.to(tl.int64)[:, None] * F + feature[None, :]
    gate = gate.to(h.dtype.element_ty)
    up = up.to(h.dtype.element_ty)
    if SAVE:
        wide = place.to(tl.int64)[:, None] * (2 * tl.cast(F, tl.int64)) + feature[None, :]
        tl.store(gate_up + wide, gate, mask=mask)
        tl.store(gate_up + wide + F, up, mask=mask)
    value, _slope = activate(gate.to(tl.float32), ACTIVATION)
    tl.store(h + at, (value * up.to(tl.float32)).to(h.dtype.element_ty), mask=mask)


@triton.jit
def moe_grouped_gemm_kernel(
    a, w, order, offsets, out,
    E, N, K, columns, stride_we, stride_wn, stride_wk,
    BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grouped GEMM, out[assignment] = a[row] · W[expert]ᵀ: rows grouped by expert in, by token and choice out."""
    pid = tl.program_id(0)
    expert, first, end = _tile_of_expert(pid // columns, offsets, E, BLOCK_M, BLOCK_E)
    if first >= end:
        return
    place = first + tl.arange(0, BLOCK_M)
    n = (pid % columns).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    a_tile = a + place.to(tl.int64)[:, None] * K + k[None, :]
    w_tile = w + expert * stride_we + n[:, None] * stride_wn + k[None, :].to(tl.int64) * stride_wk
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(0, K, BLOCK_K):
        inside = k[None, :] < K - start
        rows = tl.load(a_tile + start, mask=(place[:, None] < end) & inside, other=0.0)
        matrix = tl.load(w_tile + tl.cast(start, tl.int64) * stride_wk, mask=(n[:, None] < N) & inside, other=0.0)
        acc = tl.dot(rows, tl.trans(matrix), acc, input_precision="ieee")
    assignment = tl.load(order + place, mask=place < end, other=0).to(tl.int64)
    at = assignment[:, None] * N + n[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=(place[:, None] < end) & (n[None, :] < N))


@triton.jit(do_not_specialize=["T"])
def moe_combine_kernel(
    parts, weights, experts, out, T, C, first_expert, end_expert,
    TOP_K: tl.constexpr, WEIGHTED: tl.constexpr, SOME: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Weighted sum of each token's expert outputs, in order; with SOME, of the experts in this process."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    channel = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (token[:, None] < T) & (channel[None, :] < C)
    acc = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for choice in tl.static_range(TOP_K):
        assignment = token * TOP_K + choice
        here = mask
        if SOME:
            expert = tl.load(experts + assignment, mask=token < T, other=-1)
            here = mask & ((expert >= first_expert) & (expert < end_expert))[:, None]
        part = tl.load(parts + assignment[:, None] * C + channel[None, :], mask=here, other=0.0).to(tl.float32)
        if WEIGHTED:
            part *= tl.load(weights + assignment, mask=token < T, other=0.0)[:, None]
        acc += part
    tl.store(out + token[:, None] * C + channel[None, :], acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _through_gate(
    dh, weight, place, end, begin, F, gate_up, dgate_up, weighted, ACTIVATION: tl.constexpr, WIDTH: tl.constexpr
):
    """Backward of the gate from dh = dy · W_down, WIDTH features from `begin` on; return each row's sum of dh · h."""
    feature = begin + tl.arange(0, WIDTH)
    mask = (place[:, None] < end) & (feature[None, :] < F)
    narrow = place.to(tl.int64)[:, None] * F + feature[None, :]
    wide = narrow + place.to(tl.int64)[:, None] * F
    gate = tl.load(gate_up + wide, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + wide + F, mask=mask, other=0.0).to(tl.float32)
    value, slope = activate(gate, ACTIVATION)
    h = value * up
    share = tl.sum(dh * h, 1)
    dtype = dgate_up.dtype.element_ty
    tl.store(weighted + narrow, (weight[:, None] * h).to(dtype), mask=mask)
    dh *= weight[:, None]
    tl.store(dgate_up + wide, (dh * up * slope).to(dtype), mask=mask)
    tl.store(dgate_up + wide + F, (dh * value).to(dtype), mask=mask)
    return share


@triton.jit(do_not_specialize=["A"])
def moe_grouped_gemm_swiglu_bwd_kernel(
    dy, w_down, order, offsets, weights, gate_up, dgate_up, weighted, dweights,
    E, C, F, A, columns, stride_dt, stride_dc, stride_we, stride_wc, stride_wf,
    TOP_K: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grouped backward from dy: gradients of gate and up, the weighted h that dW_down needs, the weights' gradients.

    An assignment's weight multiplies y = h · W_downᵀ, so its gradient is dy · y = (dy · W_down) · h: what is computed
    here anyway, and y need not be kept. Each tile of features gives a share, added up later in order."""
    pid = tl.program_id(0)
    expert, first, end = _tile_of_expert(pid // columns, offsets, E, BLOCK_M, BLOCK_E)
    if first >= end:
        return
    place = first + tl.arange(0, BLOCK_M)
    column = (pid % columns).to(tl.int64)
    feature = column * BLOCK_N + tl.arange(0, BLOCK_N)
    assignment = tl.load(order + place, mask=place < end, other=0).to(tl.int64)
    channel = tl.arange(0, BLOCK_K)
    dy_tile = dy + (assignment // TOP_K)[:, None] * stride_dt + channel[None, :].to(tl.int64) * stride_dc
    w_tile = w_down + expert * stride_we + channel[:, None].to(tl.int64) * stride_wc + feature[None, :] * stride_wf
    dh = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for c in tl.range(0, C, BLOCK_K):
        step = tl.cast(c, tl.int64)
        mask = (place[:, None] < end) & (channel[None, :] < C - c)
        rows = tl.load(dy_tile + step * stride_dc, mask=mask, other=0.0)
        mask = (channel[:, None] < C - c) & (feature[None, :] < F)
        matrix = tl.load(w_tile + step * stride_wc, mask=mask, other=0.0)
        dh = tl.dot(rows, matrix, dh, input_precision="ieee")
    weight = tl.load(weights + assignment, mask=place < end, other=0.0)
    left, right = dh.reshape([BLOCK_M, 2, BLOCK_N // 2]).permute(0, 2, 1).split()
    share = _through_gate(
        left, weight, place, end, column * BLOCK_N, F, gate_up, dgate_up, weighted, ACTIVATION, BLOCK_N // 2
    )
    share += _through_gate(
        right, weight, place, end, column * BLOCK_N + BLOCK_N // 2, F, gate_up, dgate_up, weighted,
        ACTIVATION, BLOCK_N // 2,
    )  # fmt: skip
    tl.store(dweights + column * A + assignment, share, mask=place < end)


@triton.jit
def moe_grouped_dw_kernel(
    p, q, order, offsets, dw,
    N, M, columns, stride_pr, stride_pn, stride_qr, stride_qm,
    TOP_K: tl.constexpr, GATHER_P: tl.constexpr, GATHER_Q: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grouped weight gradient, dW[expert] = pᵀ · q over the expert's rows, in order; zeros for unused experts.

    p and q are rows in line, or rows of tokens that are gathered: these are looked up a step early, or no copy could
    begin before its turn."""
    expert = tl.program_id(1).to(tl.int64)
    pid = tl.program_id(0)
    n = (pid // columns).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = (pid % columns).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    begin = tl.load(offsets + expert)
    end = tl.load(offsets + expert + 1)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    own = begin + tl.arange(0, BLOCK_K)
    here = tl.load(order + own, mask=own < end, other=0)
    for start in tl.range(begin, end, BLOCK_K):
        place = start + tl.arange(0, BLOCK_K)
        gathered = (here // TOP_K).to(tl.int64)
        here = tl.load(order + place + BLOCK_K, mask=place + BLOCK_K < end, other=0)
        p_row = gathered if GATHER_P else place.to(tl.int64)
        q_row = gathered if GATHER_Q else place.to(tl.int64)
        mask = (place[:, None] < end) & (n[None, :] < N)
        p_tile = tl.load(p + p_row[:, None] * stride_pr + n[None, :] * stride_pn, mask=mask, other=0.0)
        mask = (place[:, None] < end) & (m[None, :] < M)
        q_tile = tl.load(q + q_row[:, None] * stride_qr + m[None, :] * stride_qm, mask=mask, other=0.0)
        acc = tl.dot(tl.trans(p_tile), q_tile, acc, input_precision="ieee")
    mask = (n[:, None] < N) & (m[None, :] < M)
    at = expert * (tl.cast(N, tl.int64) * M) + n[:, None] * M + m[None, :]
    tl.store(dw + at, acc.to(dw.dtype.element_ty), mask=mask)
