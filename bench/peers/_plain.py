"""Plain PyTorch transformer, by `torch.nn` alone: the baseline that our engine has to beat."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PlainTransformer(nn.Module):
    """GPT-2 or Llama, by the configuration; returns the loss."""

    def __init__(self, config, time: int):
        super().__init__()
        c = self.config = config
        self.embedding = nn.Embedding(c.vocab_size, c.d_model)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.positions = nn.Embedding(c.max_seq_len, c.d_model) if c.position == "learned" else None
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layers))
        self.norm = norm_of(c)
        self.head = nn.Linear(c.d_model, c.vocab_size, bias=False)
        if c.tie_embeddings:
            self.head.weight = self.embedding.weight
        angles = torch.outer(torch.arange(time), c.rope_theta ** (-torch.arange(0, c.head_size, 2) / c.head_size))
        self.register_buffer("cos", torch.cat([angles.cos()] * 2, -1), persistent=False)
        self.register_buffer("sin", torch.cat([angles.sin()] * 2, -1), persistent=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(tokens)
        if self.positions is not None:
            x = x + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Block(nn.Module):
    """Transformer block."""

    def __init__(self, c):
        super().__init__()
        self.sizes = [heads * c.head_size for heads in (c.n_heads, c.kv_heads, c.kv_heads)]
        self.head_size, self.rotates, self.gated = c.head_size, c.position == "rope", c.ffn == "swiglu"
        self.grouped = c.kv_heads != c.n_heads
        self.attention_norm, self.ffn_norm = norm_of(c), norm_of(c)
        self.qkv = nn.Linear(c.d_model, sum(self.sizes), bias=c.bias)
        self.out = nn.Linear(self.sizes[0], c.d_model, bias=c.bias)
        self.up = nn.Linear(c.d_model, c.ff_size * (2 if self.gated else 1), bias=c.bias)
        self.down = nn.Linear(c.ff_size, c.d_model, bias=c.bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attend(self.attention_norm(x), cos, sin)
        hidden = self.up(self.ffn_norm(x))
        if self.gated:
            gate, up = hidden.chunk(2, -1)
            return x + self.down(F.silu(gate) * up)
        return x + self.down(F.gelu(hidden, approximate="tanh"))

    def attend(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        heads = (part.unflatten(-1, (-1, self.head_size)).transpose(1, 2) for part in self.qkv(x).split(self.sizes, -1))
        q, k, v = heads
        if self.rotates:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.grouped)
        return self.out(mixed.transpose(1, 2).flatten(-2))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return (x * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)


def norm_of(c) -> nn.Module:
    if c.norm == "layernorm":
        return nn.LayerNorm(c.d_model, c.norm_eps, bias=c.bias)
    return nn.RMSNorm(c.d_model, c.norm_eps)
