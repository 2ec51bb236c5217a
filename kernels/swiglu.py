"""Gated activations act(gate) · up of SwiGLU and GeGLU feed-forward layers.

SwiGLU gates with silu; GELU and squared-ReLU gates are the same op with another `activation`. In eager PyTorch silu's
result takes a trip to memory and back, and is kept for the backward; fused, two tensors are read, one is written, and
the backward recomputes the activation from the gate, which costs nothing next to the bytes it saves.

N rows, F features.
"""

import torch
import torch.nn.functional as F

from .core.lang import cdiv, next_power_of_2, tl, triton, wide
from .core.launch import AutogradOp, as_rows, launch, launcher
from .core.op import Budget, Case, Op
from .core.tuned import tuned
from .cpu import pointwise

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


LIMIT, SLOPE = 7.0, 1.702  # gpt-oss: of both halves, and inside the sigmoid


def _clamped(gate, up):
    gate, up = gate.clamp(max=LIMIT), up.clamp(-LIMIT, LIMIT)
    return (up + 1) * gate * torch.sigmoid(SLOPE * gate)


def _swiglu(gate: torch.Tensor, up: torch.Tensor, activation: str = "silu") -> torch.Tensor:
    """activation(gate) · up, computed in float32; `activation` is "silu", "gelu" (tanh form), "relu" or "relu2".

    "clamped" is gpt-oss's: both halves bounded, (up + 1) · gate · σ(1.702 gate).
    """
    dtype = wide(gate)
    if activation == "clamped":
        return _clamped(gate.to(dtype), up.to(dtype)).to(gate.dtype)
    return (check_activation(activation)(gate.to(dtype)) * up.to(dtype)).to(gate.dtype)


def _swiglu_packed(gate_up: torch.Tensor, activation: str = "silu") -> torch.Tensor:
    """`_swiglu` for one tensor (…, 2F) with the gate in its first half and `up` in its second."""
    if gate_up.shape[-1] % 2:
        raise ValueError(f"swiglu_packed: the last dimension is {gate_up.shape[-1]}; it must be even: gate, then up")
    return _swiglu(*gate_up.chunk(2, -1), activation)


def _swiglu_eager(gate, up, activation="silu"):
    act = None if activation == "clamped" else check_activation(activation)
    if gate.shape == up.shape and pointwise.is_supported(gate, up):
        return pointwise.gate(gate, up, activation)
    return act(gate) * up if act else _swiglu(gate, up, activation)


def _swiglu_packed_eager(gate_up, activation="silu"):
    if activation != "clamped":
        check_activation(activation)
    if pointwise.is_supported(gate_up) and gate_up.shape[-1] % 2 == 0:
        return pointwise.packed_gate(gate_up, activation)
    return _swiglu_eager(*gate_up.chunk(2, -1), activation)


def check_activation(name: str):
    if name not in ACTIVATIONS:
        raise ValueError(f"activation is {name!r}; valid are {', '.join(ACTIVATIONS)}, clamped")
    return ACTIVATIONS[name]


# ---- fused ----


@triton.jit
def activate(g, ACTIVATION: tl.constexpr):
    """Activation and its derivative in float32. GELU's tanh form is g · σ(2u): no tanh is needed."""
    if ACTIVATION == "silu":
        s = tl.sigmoid(g)
        value, slope = g * s, s * (1 + g * (1 - s))
    elif ACTIVATION == "gelu":
        s = tl.sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))
        value = g * s
        slope = s + value * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * g * g)
    elif ACTIVATION == "relu":
        slope = tl.where(g > 0, 1.0, 0.0)
        value = g * slope
    else:
        positive = tl.maximum(g, 0.0)
        value, slope = positive * positive, 2 * positive
    return value, slope


@triton.jit(do_not_specialize=["N"])
def swiglu_fwd_kernel(
    gate_ptr, up_ptr, y_ptr,
    N, F, gate_row, gate_col, up_row, up_col,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    cols = (tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK))[None, :]
    mask = (rows < N) & (cols < F)
    gate = tl.load(gate_ptr + rows * gate_row + cols * gate_col, mask=mask).to(tl.float32)
    up = tl.load(up_ptr + rows * up_row + cols * up_col, mask=mask).to(tl.float32)
    value, _ = activate(gate, ACTIVATION)
    tl.store(y_ptr + rows * F + cols, (value * up).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N"])
def swiglu_bwd_kernel(
    gate_ptr, up_ptr, dy_ptr, dgate_ptr, dup_ptr,
    N, F, gate_row, gate_col, up_row, up_col, dy_row, dy_col, dgate_row, dup_row,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    cols = (tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK))[None, :]
    mask = (rows < N) & (cols < F)
    gate = tl.load(gate_ptr + rows * gate_row + cols * gate_col, mask=mask).to(tl.float32)
    up = tl.load(up_ptr + rows * up_row + cols * up_col, mask=mask).to(tl.float32)
    dy = tl.load(dy_ptr + rows * dy_row + cols * dy_col, mask=mask).to(tl.float32)
    value, slope = activate(gate, ACTIVATION)
    tl.store(dgate_ptr + rows * dgate_row + cols, (dy * up * slope).to(dgate_ptr.dtype.element_ty), mask=mask)
    tl.store(dup_ptr + rows * dup_row + cols, (dy * value).to(dup_ptr.dtype.element_ty), mask=mask)


def _launch_forward(gate_NF, up_NF, y, activation):
    N, F_ = gate_NF.shape
    grid, tile = _tiles("swiglu_forward", gate_NF)
    launch(
        swiglu_fwd_kernel, grid, gate_NF, up_NF, y,
        N, F_, *gate_NF.stride(), *up_NF.stride(), ACTIVATION=activation, **tile,
    )  # fmt: skip
    return y


def _launch_backward(gate_NF, up_NF, dy, dgate_NF, dup_NF, activation):
    N, F_ = gate_NF.shape
    dy_NF = as_rows(dy)
    grid, tile = _tiles("swiglu_backward", gate_NF)
    launch(
        swiglu_bwd_kernel, grid, gate_NF, up_NF, dy_NF, dgate_NF, dup_NF,
        N, F_, *gate_NF.stride(), *up_NF.stride(), *dy_NF.stride(), dgate_NF.stride(0), dup_NF.stride(0),
        ACTIVATION=activation, **tile,
    )  # fmt: skip


def _tiles(kernel, x_NF):
    """Tile of about a thousand columns: wider ones need twice the registers in the backward and gain nothing."""
    N, F_ = x_NF.shape
    width = next_power_of_2(F_)
    block = min(1024, width)
    tile = tuned(kernel, x_NF.device, width, {"BLOCK": block, "ROWS": 1024 // block, "num_warps": 4})
    return (cdiv(N, tile["ROWS"]), cdiv(F_, tile["BLOCK"])), tile


@launcher
def swiglu_forward(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    return _launch_forward(as_rows(gate), as_rows(up), y, activation)


@launcher
def swiglu_backward(
    gate: torch.Tensor, up: torch.Tensor, dy: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    dup = torch.empty(up.shape, dtype=up.dtype, device=up.device)
    _launch_backward(as_rows(gate), as_rows(up), dy, as_rows(dgate), as_rows(dup), activation)
    return dgate, dup


@launcher
def swiglu_packed_forward(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    gate, up = as_rows(gate_up).chunk(2, -1)
    y = torch.empty(*gate_up.shape[:-1], gate.shape[-1], dtype=gate_up.dtype, device=gate_up.device)
    return _launch_forward(gate, up, y, activation)


@launcher
def swiglu_packed_backward(gate_up: torch.Tensor, dy: torch.Tensor, activation: str) -> torch.Tensor:
    gradient = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
    _launch_backward(*as_rows(gate_up).chunk(2, -1), dy, *as_rows(gradient).chunk(2, -1), activation)
    return gradient


def _save(ctx, inputs, output):
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


_gate = AutogradOp(
    swiglu_forward,
    _save,
    lambda ctx, dy: (*swiglu_backward(*ctx.saved_tensors, dy, ctx.activation), None),
)
_gate_packed = AutogradOp(
    swiglu_packed_forward,
    _save,
    lambda ctx, dy: (swiglu_packed_backward(*ctx.saved_tensors, dy, ctx.activation), None),
)


def _swiglu_fused(gate, up, activation="silu"):
    if activation == "clamped":
        return _swiglu(gate, up, activation)
    check_activation(activation)
    if gate.shape != up.shape:
        gate, up = torch.broadcast_tensors(gate, up)
    return _gate(gate, up, activation)


def _swiglu_packed_fused(gate_up, activation="silu"):
    if activation == "clamped":
        return _swiglu_packed(gate_up, activation)
    check_activation(activation)
    if gate_up.shape[-1] % 2:
        raise ValueError(f"swiglu_packed: the last dimension is {gate_up.shape[-1]}; it must be even: gate, then up")
    return _gate_packed(gate_up, activation)


swiglu = Op(
    name="swiglu",
    reference=_swiglu,
    eager=_swiglu_eager,
    native=True,
    fused=_swiglu_fused,
    rows=("gate", "up", "gate_up"),
    cases=[
        Case("tail", lambda m: (m.normal(3, 100), m.normal(3, 100))),
        Case("gelu", lambda m: (m.normal(3, 64), m.normal(3, 64)), {"activation": "gelu"}),
        Case("clamped", lambda m: (m.normal(3, 100, scale=5), m.normal(3, 100, scale=5)), {"activation": "clamped"}),
        Case("squared relu", lambda m: (m.normal(3, 64), m.normal(3, 64)), {"activation": "relu2"}),
        Case(
            "halves of one tensor", lambda m: tuple(x.detach().requires_grad_() for x in m.normal(4, 96).chunk(2, -1))
        ),
        Case("every other column", lambda m: (m.strided(2, 2, 40), m.normal(2, 2, 40))),
        Case("expanded gradient", lambda m: (m.normal(4, 48), m.normal(4, 48)), expanded=True),
        Case("no rows", lambda m: (m.normal(0, 48), m.normal(0, 48))),
        Case("large magnitude", lambda m: (m.normal(3, 64, scale=100), m.normal(3, 64, scale=100))),
        Case("8192x14336", lambda m: (m.normal(8192, 14336), m.normal(8192, 14336)), bench=True),
    ],
    traffic=lambda gate, up, activation="silu": (3 * gate.nbytes, 5 * gate.nbytes),
    budget=Budget(registers=64, vector=True),
    flops=lambda gate, up, activation="silu": (5 * gate.numel(), 10 * gate.numel()),
)

swiglu_packed = Op(
    name="swiglu_packed",
    reference=_swiglu_packed,
    eager=_swiglu_packed_eager,
    native=True,
    fused=_swiglu_packed_fused,
    shapes="gate_up ... F",
    rows=("gate", "up", "gate_up"),
    cases=[
        Case("tail", lambda m: (m.normal(3, 104),)),
        Case("padded rows", lambda m: (m.padded(2, 3, 64),)),
        Case("expanded gradient", lambda m: (m.normal(4, 48),), expanded=True),
        Case("8192x28672", lambda m: (m.normal(8192, 28672),), bench=True),
    ],
    traffic=lambda gate_up, activation="silu": (gate_up.nbytes * 3 // 2, gate_up.nbytes * 5 // 2),
    budget=Budget(registers=64, vector=True),
    flops=lambda gate_up, activation="silu": (5 * gate_up.numel() // 2, 5 * gate_up.numel()),
)
