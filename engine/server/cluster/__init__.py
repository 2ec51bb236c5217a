"""Data-parallel serving: proxy, Ray replicas, prefix-aware routing."""
