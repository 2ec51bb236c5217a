"""Tools of the kernel engineer: correctness checks, tuning, ahead-of-time compilation."""
