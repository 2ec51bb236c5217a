"""The playground and the static pages."""
