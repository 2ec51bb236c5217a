"""Kernel engineering tools: correctness checks, tuning, ahead-of-time compilation."""
