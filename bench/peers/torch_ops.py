"""PyTorch's own fused ops: scaled_dot_product_attention's backends, grouped products, fused AdamW."""

NEEDS = ("torch",)


def kernel(op, args, options):
    """PyTorch's fused equivalent of the op, if it has one."""
    known = {"attention": _attention, "moe": _grouped_experts, "adamw_step": _fused_adamw, "rms_norm": _rms_norm}
    return known[op](args, options) if op in known else {}


def _rms_norm(args, options):
    import torch.nn.functional as F

    return {"torch F.rms_norm": lambda x, weight, eps=1e-6: F.rms_norm(x, x.shape[-1:], weight, eps)}


def _attention(args, options):
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if set(options) - {"causal", "scale"}:
        return {}

    def using(which):
        def call(q, k, v, causal=True, scale=None):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            with sdpa_kernel(which):
                grouped = q.shape[1] != k.shape[1]
                return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped)

        return call

    return {
        "SDPA cuDNN": using(SDPBackend.CUDNN_ATTENTION),
        "SDPA flash": using(SDPBackend.FLASH_ATTENTION),
    }


def _grouped_experts(args, options):
    import torch

    from ...kernels.moe import route
    from ...kernels.swiglu import swiglu_packed
    from . import compiled

    def call(x, router_logits, w_gate_up, w_down, top_k, score="softmax", normalize=True, activation="silu"):
        weights, experts, aux = route(router_logits, top_k, score, normalize)
        order = experts.flatten().argsort(stable=True)
        ends = aux.tokens_per_expert.cumsum(0).to(torch.int32)
        gate_up = torch._grouped_mm(x[order // top_k], w_gate_up.transpose(1, 2), offs=ends)
        y = torch._grouped_mm(swiglu_packed.reference(gate_up, activation), w_down.transpose(1, 2), offs=ends)
        y = y[order.argsort()].view(-1, top_k, y.shape[-1])
        return (y * weights.unsqueeze(-1).to(y.dtype)).sum(1)

    return {"torch._grouped_mm": call, "torch._grouped_mm compiled": compiled(call)}


def _fused_adamw(args, options):
    import torch

    param, grad = args[:2]
    master = options.get("master")
    target = param.clone() if master is None else master.clone()
    target.grad = grad.to(target.dtype)
    optimizer = torch.optim.AdamW([target], fused=True)
    return {"torch fused AdamW (without clip and cast)": lambda *_, **__: optimizer.step()}
