"""FlashInfer's CUDA ops for serving."""

NEEDS = ("flashinfer",)


def kernel(op, args, options):
    """FlashInfer's RMSNorm and sort-free sampling (one generator for all rows, unlike ours)."""
    import flashinfer

    if op == "rms_norm":
        return {"FlashInfer (no gradient)": lambda x, weight, eps=1e-6: flashinfer.norm.rmsnorm(x, weight, eps)}
    if op == "add_rms_norm":

        def call(x, residual, weight, eps=1e-6):
            flashinfer.norm.fused_add_rmsnorm(x, residual, weight, eps)
            return x

        return {"FlashInfer (in place)": call}
    if op == "sample":
        return {"FlashInfer": _sample}
    return {}


def _sample(logits, temperature, top_k, top_p, min_p, seeds, positions):
    import flashinfer
    import torch

    p = torch.softmax(logits.float() / temperature[:, None], -1)
    return flashinfer.sampling.top_k_top_p_sampling_from_probs(p, top_k, top_p)
