"""Continuous batching as plain Python: scheduler, sequences, page pool. Imports no torch."""
