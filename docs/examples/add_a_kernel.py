"""Write an op of your own: the formula, a Triton kernel each way, and the record that checks one by the other.

The op is `quick_gelu`, x · σ(slope · x), the activation of CLIP. Without a GPU:

    TRITON_INTERPRET=1 python docs/examples/add_a_kernel.py
"""

import torch

from warploom.kernels import Case, Op
from warploom.kernels.core.lang import cdiv, tl, triton
from warploom.kernels.core.launch import AutogradOp, launch, launcher
from warploom.kernels.tools.verify import errors

BLOCK = 1024


def _quick_gelu(x: torch.Tensor, slope: float = 1.702) -> torch.Tensor:
    """The formula, in plain PyTorch: the oracle of every test."""
    return x * torch.sigmoid(slope * x)


@triton.jit
def quick_gelu_fwd_kernel(x_ptr, y_ptr, N, slope, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < N).to(tl.float32)
    tl.store(y_ptr + i, (x * tl.sigmoid(slope * x)).to(y_ptr.dtype.element_ty), mask=i < N)


@triton.jit
def quick_gelu_bwd_kernel(x_ptr, dy_ptr, dx_ptr, N, slope, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < N).to(tl.float32)
    dy = tl.load(dy_ptr + i, mask=i < N).to(tl.float32)
    s = tl.sigmoid(slope * x)
    tl.store(dx_ptr + i, (dy * (s + slope * x * s * (1 - s))).to(dx_ptr.dtype.element_ty), mask=i < N)


@launcher
def quick_gelu_forward(x: torch.Tensor, slope: float) -> torch.Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    launch(quick_gelu_fwd_kernel, (cdiv(x.numel(), BLOCK),), x, y, x.numel(), slope, BLOCK=BLOCK)
    return y


@launcher
def quick_gelu_backward(x: torch.Tensor, dy: torch.Tensor, slope: float) -> torch.Tensor:
    x, dy = x.contiguous(), dy.contiguous()  # a gradient may arrive with stride 0
    dx = torch.empty_like(x)
    launch(quick_gelu_bwd_kernel, (cdiv(x.numel(), BLOCK),), x, dy, dx, x.numel(), slope, BLOCK=BLOCK)
    return dx


def _save(ctx, inputs, output):
    x, ctx.slope = inputs
    ctx.save_for_backward(x)


_activate = AutogradOp(
    quick_gelu_forward, _save, lambda ctx, dy: (quick_gelu_backward(*ctx.saved_tensors, dy, ctx.slope), None)
)

quick_gelu = Op(
    name="quick_gelu",
    reference=_quick_gelu,
    fused=lambda x, slope=1.702: _activate(x, slope),
    cases=[
        Case("tail", lambda m: (m.normal(3, 100, scale=4),)),
        Case("strided", lambda m: (m.strided(4, 48),), {"slope": 1.0}),
        Case("expanded gradient", lambda m: (m.normal(4, 48),), expanded=True),
    ],
)


def main(device: str = "cuda" if torch.cuda.is_available() else "cpu") -> int:
    """Hold the kernel to its formula: at most twice the error of eager PyTorch, both against float64."""
    wrong = 0
    for dtype in (torch.float32, torch.bfloat16):
        for case in quick_gelu.cases:
            found = errors(quick_gelu, case, dtype, device)
            wrong += len(found)
            print(f"{case.name}, {dtype}:", "; ".join(found) or "right")
    return wrong


if __name__ == "__main__":
    raise SystemExit(main())
