"""Kernels, one file an op: eager reference, Triton kernel, and the `Op` record with its tests."""

from .adamw import adamw_step
from .attention import attention
from .basics import scaled_dot_product_attention, silu, softmax
from .core.op import Budget, Case, Maker, Op, backend, ops
from .cross_entropy import cross_entropy
from .hadamard import hadamard
from .head_linear import head_linear
from .latent_attention import latent_attention
from .linear import linear
from .linear_cross_entropy import linear_cross_entropy
from .linear_residual import linear_residual, normed_linear
from .linear_swiglu import linear_swiglu
from .moe import MoEAux, moe
from .packed_linear import packed_linear
from .packed_moe import packed_moe
from .packed_residual import packed_linear_residual, packed_normed_linear
from .paged_attention import paged_attention
from .penalize import penalize
from .qk_norm_rope_write import qk_norm_rope_write
from .rms_norm import add_rms_norm, rms_norm
from .rope import rope, rope_tables
from .sample import sample
from .swiglu import swiglu, swiglu_packed
from .write_pages import write_pages

__all__ = [
    "Budget",
    "Case",
    "Maker",
    "MoEAux",
    "Op",
    "adamw_step",
    "add_rms_norm",
    "attention",
    "backend",
    "cross_entropy",
    "hadamard",
    "head_linear",
    "latent_attention",
    "linear",
    "linear_cross_entropy",
    "linear_residual",
    "linear_swiglu",
    "moe",
    "normed_linear",
    "ops",
    "packed_linear",
    "packed_linear_residual",
    "packed_moe",
    "packed_normed_linear",
    "paged_attention",
    "penalize",
    "qk_norm_rope_write",
    "rms_norm",
    "rope",
    "rope_tables",
    "sample",
    "scaled_dot_product_attention",
    "silu",
    "softmax",
    "swiglu",
    "swiglu_packed",
    "write_pages",
]
