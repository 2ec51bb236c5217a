"""HTTP server: OpenAI-compatible protocols, metrics, playground page."""
