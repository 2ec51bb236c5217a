"""Playground and static pages."""
