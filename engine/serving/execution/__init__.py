"""Execution of step plans: model runner, paged KV cache, sampler, executors for each device."""
