"""Gated activations: act(gate) · up, the heart of a modern feed-forward layer.

SwiGLU gates with silu; GELU and squared-ReLU gates are the same op with another `activation`. In eager PyTorch silu's
result takes a trip to memory and back, and is kept for the backward; fused, two tensors are read, one is written, and
the backward recomputes the activation from the gate, which costs nothing next to the bytes it saves.

N rows, F features.
"""

import torch
import torch.nn.functional as F

from .lang import wide
from .op import Case, Op

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


def _swiglu(gate: torch.Tensor, up: torch.Tensor, activation: str = "silu") -> torch.Tensor:
    """activation(gate) · up, computed in float32; `activation` is "silu", "gelu" (tanh form), "relu" or "relu2"."""
    dtype = wide(gate)
    return (_activation(activation)(gate.to(dtype)) * up.to(dtype)).to(gate.dtype)


def _swiglu_packed(gate_up: torch.Tensor, activation: str = "silu") -> torch.Tensor:
    """The same for one tensor (…, 2F) that holds the gate in its first half and `up` in its second."""
    if gate_up.shape[-1] % 2:
        raise ValueError(f"swiglu_packed: the last dimension is {gate_up.shape[-1]}; it must be even: gate, then up")
    return _swiglu(*gate_up.chunk(2, -1), activation)


def _swiglu_eager(gate, up, activation="silu"):
    return _activation(activation)(gate) * up


def _swiglu_packed_eager(gate_up, activation="silu"):
    return _swiglu_eager(*gate_up.chunk(2, -1), activation)


def _activation(name: str):
    if name not in ACTIVATIONS:
        raise ValueError(f"activation is {name!r}; valid are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


swiglu = Op(
    name="swiglu",
    reference=_swiglu,
    eager=_swiglu_eager,
    cases=[
        Case("tail", lambda m: (m.normal(3, 100), m.normal(3, 100))),
        Case("gelu", lambda m: (m.normal(3, 64), m.normal(3, 64)), {"activation": "gelu"}),
        Case("squared relu", lambda m: (m.normal(3, 64), m.normal(3, 64)), {"activation": "relu2"}),
        Case("halves of one tensor", lambda m: m.normal(4, 96, grad=False).chunk(2, -1)),
        Case("every other column", lambda m: (m.strided(2, 2, 40), m.normal(2, 2, 40))),
        Case("expanded gradient", lambda m: (m.normal(4, 48), m.normal(4, 48)), expanded=True),
        Case("no rows", lambda m: (m.normal(0, 48), m.normal(0, 48))),
        Case("large magnitude", lambda m: (m.normal(3, 64, scale=100), m.normal(3, 64, scale=100))),
        Case("8192x14336", lambda m: (m.normal(8192, 14336), m.normal(8192, 14336)), bench=True),
    ],
    traffic=lambda gate, up, activation="silu": (3 * gate.nbytes, 5 * gate.nbytes),
    flops=lambda gate, up, activation="silu": (5 * gate.numel(), 10 * gate.numel()),
)

swiglu_packed = Op(
    name="swiglu_packed",
    reference=_swiglu_packed,
    eager=_swiglu_packed_eager,
    cases=[
        Case("tail", lambda m: (m.normal(3, 104),)),
        Case("padded rows", lambda m: (m.padded(2, 3, 64),)),
        Case("expanded gradient", lambda m: (m.normal(4, 48),), expanded=True),
        Case("8192x28672", lambda m: (m.normal(8192, 28672),), bench=True),
    ],
    traffic=lambda gate_up, activation="silu": (gate_up.nbytes * 3 // 2, gate_up.nbytes * 5 // 2),
    flops=lambda gate_up, activation="silu": (5 * gate_up.numel() // 2, 5 * gate_up.numel()),
)
