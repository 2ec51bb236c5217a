"""Adapters around other projects, so that every number has a neighbor."""
