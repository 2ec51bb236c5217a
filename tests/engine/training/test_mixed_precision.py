import numpy as np
import pytest
import torch

from warploom.engine.config import ModelConfig
from warploom.engine.data import PackedDocuments
from warploom.engine.data.loader import IGNORE
from warploom.engine.data.tokens import TokenSplit
from warploom.engine.model import Transformer
from warploom.engine.training import train
from warploom.engine.training.evaluate import losses
from warploom.engine.training.mixed_precision import EMA, LossScale, Masters

TINY = ModelConfig(50, d_model=16, n_layers=2, n_heads=2, max_seq_len=16)


def test_float16_follows_float32_curve(tiny, recorders):
    """Float16 trains with a scaled loss and follows the float32 curve."""
    curves = []
    for dtype in ("float32", "float16"):
        recorder = recorders()
        train(tiny(dtype, dtype=dtype, steps=6, batch_size=2, eval_every=0), [recorder])
        curves.append(recorder.losses)
        assert not any("skipped" in note for note in recorder.notes)
    assert curves[1] == pytest.approx(curves[0], rel=0.02)


def test_loss_scale_halves_then_doubles():
    """The loss scale halves on overflow and doubles after a calm."""
    scale = LossScale(torch.float16, patience=3)
    start = scale.value
    scale.update(finite=False)
    assert scale.value == start / 2
    for _ in range(3):
        scale.update(finite=True)
    assert scale.value == start
    p = torch.ones(2, requires_grad=True)
    p.grad = torch.full((2,), start)
    scale.unscale([p])
    assert p.grad.tolist() == [1.0, 1.0]
    off = LossScale(torch.bfloat16)
    off.update(finite=False)
    assert off.value == 1.0


def test_masters_keep_small_updates():
    """Small updates and small gradients survive in the masters."""
    torch.manual_seed(0)
    model = Transformer(TINY)
    masters = Masters(model, torch.bfloat16)
    weight, master = model.norm.weight, masters.named["norm.weight"]
    with torch.no_grad():
        for _ in range(8):
            master.add_(1e-3)
            masters.copy_to_model()
    assert torch.allclose(master, torch.full_like(master, 1.008))
    assert weight.dtype == torch.bfloat16 and torch.equal(weight, master.bfloat16())
    for size in (256.0, 1.0, -256.0):
        (weight * size).sum().backward()
    assert weight.grad is None and torch.equal(master.grad, torch.ones_like(master))


def test_the_running_average_is_the_recurrence():
    model = Transformer(TINY)
    masters = Masters(model, torch.float32)
    average, expected = EMA(masters, 0.9), model.norm.weight.detach().clone()
    for step in range(5):
        with torch.no_grad():
            masters.named["norm.weight"].fill_(float(step))
        average.update()
        expected = 0.9 * expected + 0.1 * step
    torch.testing.assert_close(average.weights["norm.weight"], expected)


@pytest.mark.parametrize("changes", [{}, {"position": "learned"}, {"sliding_window": 3}])
def test_a_packed_document_has_the_loss_it_has_alone(changes):
    torch.manual_seed(0)
    model = Transformer(TINY.replace(**changes)).eval()
    lengths = [5, 9, 3, 12, 2, 7]
    tokens = np.random.default_rng(0).integers(0, 50, sum(lengths)).astype(np.uint16)
    starts = np.cumsum([0, *lengths[:-1]])
    batch = PackedDocuments(TokenSplit("train", tokens, starts, 0), 2, 16, shuffle=False).batch(0)
    packed = losses(model, batch).cross_entropy
    alone, count = 0.0, 0
    for row in batch.targets_BT:
        count += int((row != IGNORE).sum())
    flat_tokens, flat_targets = batch.tokens_BT.flatten(), batch.targets_BT.flatten()
    for start, stop in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:]):
        if flat_targets[start] != IGNORE:
            part = model.loss(flat_tokens[None, start:stop], flat_targets[None, start:stop])
            alone += part.item() * int(stop - start)
    assert packed.item() == pytest.approx(alone / count, rel=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_clip_step_and_copy_in_one_pass(tiny, recorders, monkeypatch, dtype):
    """As large weights on a GPU are stepped: the losses are those of three passes, up to float32's rounding."""
    curves = []
    for one_pass in (False, True):
        if one_pass:
            monkeypatch.setattr(Masters, "copies", lambda self, smallest: dict(zip(self.named.values(), self._rounded)))
        recorder = recorders()
        settings = {"steps": 6, "batch_size": 2, "eval_every": 0, "max_grad_norm": 0.5}
        train(tiny(f"{dtype} {one_pass}", dtype=dtype, **settings), [recorder])
        curves.append(recorder.losses)
    assert curves[1] == pytest.approx(curves[0], rel=1e-5 if dtype == "float32" else 1e-3)
