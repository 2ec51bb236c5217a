"""The loop, optimizers, schedules, checkpoints, evaluation, parallelism."""
