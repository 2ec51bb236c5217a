import math

import pytest
import torch

from warploom.engine.training.optim import AdamW, Muon, SGDDecay, adamw_update, clip_grad_norm, orthogonalize


def problem(dtype=torch.float64, seed=0):
    """Parameters of several shapes, and the gradients of a few steps."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(4, 3), (7,), (2, 5)]
    params = [torch.randn(s, generator=g, dtype=dtype).requires_grad_() for s in shapes]
    grads = [[torch.randn(s, generator=g, dtype=dtype) for s in shapes] for _ in range(5)]
    return params, grads


def run(optimizer, params, grads, change_lr=True):
    for t, step_grads in enumerate(grads):
        for p, grad in zip(params, step_grads):
            p.grad = grad.clone()
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / (t + 1) if change_lr else group["lr"]
        optimizer.step()
    return [p.detach() for p in params]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adamw_equals_torch_and_the_written_formula(dtype):
    settings = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3}
    results = []
    for cls in (AdamW, torch.optim.AdamW):
        params, grads = problem(dtype)
        results.append(run(cls(params, **settings), params, grads))
    params, grads = problem(dtype)
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in params]
    with torch.no_grad():
        for t, step_grads in enumerate(grads):
            for p, grad, (m, v) in zip(params, step_grads, moments):
                adamw_update(p, grad, m, v, t + 1, lr=0.1 / (t + 1), beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=0.3)
    results.append([p.detach() for p in params])
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, rtol=50 * torch.finfo(dtype).eps, atol=1e-7)


def test_adamw_in_float32_stays_as_close_to_float64_as_torch_does():
    (exact, grads64), errors = problem(torch.float64), []
    run(torch.optim.AdamW(exact, lr=0.1), exact, grads64)
    for cls in (AdamW, torch.optim.AdamW):
        params, grads = problem(torch.float64)
        params = [p.detach().float().requires_grad_() for p in params]
        run(cls(params, lr=0.1), params, [[grad.float() for grad in step] for step in grads])
        errors.append(max((p - q).abs().max().item() for p, q in zip(params, exact)))
    assert errors[0] <= 2 * errors[1]


def test_sgd_decay_steps_by_the_root_of_the_step_number():
    params, grads = problem()
    expected = [p.detach().clone() for p in params]
    for t, step_grads in enumerate(grads, 1):
        expected = [p - 0.5 / math.sqrt(t) * grad for p, grad in zip(expected, step_grads)]
    result = run(SGDDecay(params, lr=0.5), params, grads, change_lr=False)
    torch.testing.assert_close(result, expected)


def test_muon_equals_torch_muon_on_matrices_and_adamw_on_vectors():
    params, grads = problem(torch.float32)
    result = run(Muon(params, lr=0.1, weight_decay=0.1, eps=1e-8), params, grads)
    matrices, vectors = problem(torch.float32)[0], problem(torch.float32)[0]
    theirs = torch.optim.Muon(
        [matrices[0], matrices[2]], lr=0.1, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    run(theirs, matrices, grads)
    run(torch.optim.AdamW([vectors[1]], lr=0.1, betas=(0.9, 0.95), weight_decay=0.1), vectors, grads)
    torch.testing.assert_close(result[0], matrices[0].detach(), rtol=0, atol=2e-3)  # Newton–Schulz runs in bfloat16
    torch.testing.assert_close(result[2], matrices[2].detach(), rtol=0, atol=2e-3)
    torch.testing.assert_close(result[1], vectors[1].detach())


@pytest.mark.parametrize("shape", [(8, 8), (5, 20), (3, 20, 5)])
def test_orthogonalize_keeps_directions_and_levels_the_singular_values(shape):
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    levelled = torch.linalg.svdvals(orthogonalize(matrix, dtype=torch.float64))
    assert s.max() / s.min() > 1.5
    assert 0.5 < levelled.min() and levelled.max() < 1.3
    inner = u.mT @ orthogonalize(matrix, dtype=torch.float64) @ v.mT
    off_diagonal = inner - torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1))
    assert off_diagonal.abs().max() < 1e-10


@pytest.mark.parametrize("max_norm", [0.1, 1e6])
def test_clipping_equals_torch_and_returns_the_norm_before(max_norm):
    ours, theirs = (problem()[0] for _ in range(2))
    for params in (ours, theirs):
        for p, grad in zip(params, problem()[1][0]):
            p.grad = grad.clone()
    norm = clip_grad_norm(ours, max_norm)
    expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    torch.testing.assert_close(norm, expected)
    torch.testing.assert_close([p.grad for p in ours], [p.grad for p in theirs])


def test_a_restored_optimizer_continues_exactly():
    for cls in (AdamW, Muon, SGDDecay):
        params, grads = problem(torch.float32)
        whole = run(cls(params), params, grads)
        params, grads = problem(torch.float32)
        first = cls(params)
        run(first, params, grads[:2])
        second = cls(params)
        second.load_state_dict(first.state_dict())
        for p, grad in zip(params, grads[2]):
            p.grad = grad.clone()
        for t in (2, 3, 4):
            for p, grad in zip(params, grads[t]):
                p.grad = grad.clone()
            second.param_groups[0]["lr"] = 0.1 / (t + 1)
            second.step()
        assert all(torch.equal(p, q) for p, q in zip(params, whole))


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match=r"betas\[1\] must be in"):
        AdamW(problem()[0], betas=(0.9, 1.0))
    with pytest.raises(ValueError, match="lr must be at least 0, not -1"):
        SGDDecay(problem()[0], lr=-1)
