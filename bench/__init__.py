"""Benchmarks: side-by-side measurements with peers, their records and plots."""
