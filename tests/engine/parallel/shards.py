"""One of two processes that hold a model together: compares it with the whole model, which each of them also has."""

import torch
import torch.distributed as dist

from tests.processes import join_run
from warploom.engine.config import ModelConfig
from warploom.engine.generation import generate
from warploom.engine.model import Transformer
from warploom.engine.parallel.collectives import all_gather_detached, chunk_range
from warploom.engine.parallel.tensor_parallel import shard, shard_spec

BASE = dict(vocab_size=67, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=48, max_seq_len=16)
MOE = dict(n_experts=4, balance_loss=0.1, router_z_loss=0.1)
CASES = {
    "llama": {},
    "gpt2": dict(norm="layernorm", position="learned", ffn="gelu", bias=True, n_kv_heads=4),
    "untied": dict(tie_embeddings=False, qkv_bias=True, position="sinusoidal", logit_softcap=4.0),
    "qwen3": dict(qk_norm=True),
    "moe": dict(**MOE, shared_ff=48),
    "switch": dict(**MOE, experts_per_token=1),
    "gemma": dict(qk_norm="head", norm_place="both", layers="wf", sliding_window=5, ffn="geglu", embedding_scale=3.0)
    | dict(local_rope={"rope_theta": 100.0}, attention_scale=0.3),
    "neox": dict(norm="layernorm", residual="parallel", rotary_dim=4, ffn="gelu_erf", bias=True, output_bias=False),
    "granite": dict(residual="shared", residual_scale=0.3, logit_scale=0.5, qk_norm="after", layers="fn"),
}
LONELY = 0.0  # a router whose weights are zero sends every token to the first expert, which one process owns


def models(changes, **groups):
    torch.manual_seed(0)
    whole, piece = (Transformer(ModelConfig(**BASE | changes)).double() for _ in range(2))
    piece.load_state_dict(whole.state_dict())
    for p in piece.parameters():  # vectors start as ones and zeros, which hide mistakes
        p.data += torch.randn_like(p) / 8 if p.ndim == 1 else 0
    whole.load_state_dict(piece.state_dict())
    return whole, shard(piece, **groups)


def batch(rows):
    torch.manual_seed(1)
    tokens = torch.randint(0, BASE["vocab_size"], (rows, 16))
    targets = torch.randint(0, BASE["vocab_size"], (rows, 16))
    targets[0, :5] = targets[1, 3:14] = -100  # 32 are left, whose inverse is exact in float32 too
    return tokens, targets


def close(ours, theirs, what):
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12, msg=lambda text: f"{what}: {text}")


def tensor_parallel(name, changes):
    """Losses, logits and gradients of the pieces are those of the whole."""
    group = dist.group.WORLD
    whole, piece = models(changes, tp=group)
    tokens, targets = batch(3)
    close(piece(tokens), whole(tokens), f"{name} logits")
    weights = torch.randn(tokens.shape, dtype=torch.float64)
    for options in ({}, {"label_smoothing": 0.1, "z_loss": 0.01}, {"weights_BT": weights}):
        ours, theirs = (model.losses(tokens, targets, **options) for model in (piece, whole))
        close(ours.total, theirs.total, f"{name} loss")
        for model, loss in ((piece, ours), (whole, theirs)):
            model.zero_grad()
            loss.total.backward()
        theirs = dict(whole.named_parameters())
        for path, p in piece.named_parameters():
            where = shard_spec(whole.config, path)
            expected = theirs[path].grad
            if where.tp is not None:
                expected = where.cut(expected, group.rank(), group.size())
                assert p.numel() <= -(-theirs[path].numel() * 34 // 67), f"{path} is not cut"
            close(p.grad, expected, f"{name} gradient of {path}")
    assert list(generate(piece.eval(), [1, 2, 3], 8)) == list(generate(whole.eval(), [1, 2, 3], 8))


def expert_parallel(name, changes, router=1.0):
    """Each process trains on its rows, with its experts: sums over processes are the whole's gradients."""
    group = dist.group.WORLD
    whole, piece = models({**changes, "balance_loss": 0.0}, ep=group)
    for block in (*whole.blocks, *piece.blocks):
        block.ffn.router.weight.data *= router
    tokens, targets = batch(4)
    targets[:] = targets.clamp(min=0)
    own = chunk_range(4, group.rank(), group.size())
    whole.loss(tokens, targets).backward()
    (piece.loss(tokens[own], targets[own]) / group.size()).backward()
    theirs = dict(whole.named_parameters())
    for path, p in piece.named_parameters():
        expected, where = theirs[path].grad, shard_spec(whole.config, path)
        if where.ep is None:
            close(all_gather_detached(p.grad[None], group).sum(0), expected, f"{name} gradient of {path}")
        else:
            close(p.grad, expected[chunk_range(4, group.rank(), group.size())], f"{name} gradient of {path}")


def main(rank, port):
    join_run(rank, 2, port)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for name, changes in CASES.items():
        tensor_parallel(name, changes)
    for name in ("moe", "switch"):
        expert_parallel(name, CASES[name])
    expert_parallel("lonely", CASES["switch"], router=LONELY)
    dist.destroy_process_group()
