"""Other protocols over the same conversations: OpenAI's Responses and Anthropic's Messages."""
