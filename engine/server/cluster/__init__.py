"""Several engines behind one port: proxy, Ray replicas, prefix-aware routing."""
