"""Execution of a step plan: model runner, paged KV cache, sampler, and the executors of each device."""
