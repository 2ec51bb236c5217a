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


def test_adamw_float32_as_close_as_torch():
    """Adamw in float32 stays as close to float64 as torch does."""
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


def muon_by_svd(p, grads, lr, momentum=0.95, weight_decay=0.1):
    """The paper in float64: the quintic applied five times to the singular values themselves."""
    mean = torch.zeros_like(p)
    for t, grad in enumerate(grads):
        mean = momentum * mean + (1 - momentum) * grad
        u, s, v = torch.linalg.svd((1 - momentum) * grad + momentum * mean, full_matrices=False)
        s = s / s.norm()
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        rate = lr / (t + 1)
        p = (1 - rate * weight_decay) * p - rate * 0.2 * math.sqrt(max(p.shape)) * (u * s) @ v
    return p


def test_muon_follows_paper_like_torch():
    """Muon follows the paper as closely as torch and leaves vectors to adamw."""
    params, grads = problem()
    exact = [muon_by_svd(params[i].detach(), [step[i] for step in grads], 0.1) for i in (0, 2)]
    grads = [[grad.float() for grad in step] for step in grads]
    ours, theirs, vectors = ([p.detach().float().requires_grad_() for p in params] for _ in range(3))
    run(Muon(ours, weight_decay=0.1), ours, grads)
    peer = torch.optim.Muon([theirs[0], theirs[2]], weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    run(peer, theirs, grads)
    for i, expected in zip((0, 2), exact):
        error, peer_error = ((p[i].detach() - expected).abs().max() for p in (ours, theirs))
        assert error <= 2 * peer_error + 1e-6
    run(torch.optim.AdamW([vectors[1]], betas=(0.9, 0.95), weight_decay=0.1), vectors, grads)
    torch.testing.assert_close(ours[1].detach(), vectors[1].detach())


@pytest.mark.parametrize("shape", [(8, 8), (5, 20), (3, 20, 5)])
def test_orthogonalize_levels_singular_values(shape):
    """Orthogonalize keeps directions and levels the singular values."""
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    levelled = torch.linalg.svdvals(orthogonalize(matrix, dtype=torch.float64))
    assert s.max() / s.min() > 1.5
    assert levelled.min() > 0.5 and levelled.max() < 1.3
    inner = u.mT @ orthogonalize(matrix, dtype=torch.float64) @ v.mT
    off_diagonal = inner - torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1))
    assert off_diagonal.abs().max() < 1e-10


@pytest.mark.parametrize("max_norm", [0.1, 1e6])
def test_clipping_equals_torch(max_norm):
    """Clipping equals torch and returns the norm before."""
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


def test_restored_optimizer_state_on_weights_device():
    """A checkpoint is read to the CPU; the fused step on a GPU wants its counters beside the weights."""
    here, there = (torch.nn.Parameter(torch.ones(2, device=device)) for device in ("cpu", "meta"))
    here.grad = torch.ones(2)
    first, second = AdamW([here]), AdamW([there])
    first.step()
    second.load_state_dict(first.state_dict())
    assert len(second.state[there]) == 3 and all(value.is_meta for value in second.state[there].values())


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match=r"betas\[1\] must be in"):
        AdamW(problem()[0], betas=(0.9, 1.0))
    with pytest.raises(ValueError, match="lr must be at least 0, not -1"):
        SGDDecay(problem()[0], lr=-1)
