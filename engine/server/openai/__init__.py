"""The OpenAI protocol: request and response bodies, chat templates, errors."""
