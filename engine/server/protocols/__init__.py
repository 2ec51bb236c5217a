"""Other protocols, translated to chats: OpenAI's Responses, Anthropic's Messages."""
