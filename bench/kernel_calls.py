"""Profiling target: one call of each performance-critical kernel at its large cases.

    ncu --profile-from-start off --kernel-name regex:… python -m warploom.bench.kernel_calls

Each call is made once before, which compiles it.
"""

KERNELS = {
    "attention_forward_kernel": "attention",
    "attention_dq_kernel": "attention",
    "attention_dkdv_kernel": "attention",
    "paged_attention_kernel": "paged_attention",
    "moe_grouped_gemm_swiglu_kernel": "moe",
    "linear_kernel": "linear",
}
"""Their ops. Of each op the first large case is called, forward and backward if it has one."""


def main() -> int:
    """Call each op twice, the second time under the profiler."""
    import torch

    from .. import kernels

    for name in dict.fromkeys(KERNELS.values()):
        op = getattr(kernels, name)
        case = next(case for case in op.cases if case.bench)
        args, options = case.build(kernels.Maker(torch.bfloat16, "cuda"))
        wanted = [x for x in args if isinstance(x, torch.Tensor) and x.requires_grad]

        def call(op=op, args=args, options=options, wanted=wanted):
            with kernels.backend("triton"):
                result = op(*args, **options)
                y = result if isinstance(result, torch.Tensor) else result[0]
                if wanted:
                    torch.autograd.grad(y, wanted, torch.ones_like(y), allow_unused=True)
            torch.cuda.synchronize()

        call()
        with torch.cuda.profiler.profile():
            call()
        print(f"{name}, {case.name}: called", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
