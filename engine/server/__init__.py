"""HTTP: the OpenAI protocol, metrics and the playground page."""
