"""Liger Kernel's Triton ops."""

NEEDS = ("liger_kernel",)


def kernel(op, args, options):
    """Liger's equivalent of the op, if it has one with these options."""
    from liger_kernel.transformers import functional as liger

    if options:
        return {}
    calls = {
        "rms_norm": lambda x, weight, eps=1e-6: liger.liger_rms_norm(x, weight, eps, in_place=False),
        "add_rms_norm": lambda x, residual, weight, eps=1e-6: liger.liger_fused_add_rms_norm(
            x, residual, weight, eps, in_place=False
        ),
        "swiglu": lambda gate, up: liger.liger_swiglu(gate, up),
        "cross_entropy": lambda logits, targets: liger.liger_cross_entropy(logits.clone(), targets),
        "linear_cross_entropy": lambda hidden, weight, targets: liger.liger_fused_linear_cross_entropy(
            hidden, weight, targets
        ),
    }
    name = "Liger (and the copy it overwrites)" if op == "cross_entropy" else "Liger"
    return {name: calls[op]} if op in calls else {}
