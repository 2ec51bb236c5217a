"""Requests, pages, scheduler, runner, sampling, text, and the `LLM` facade."""
