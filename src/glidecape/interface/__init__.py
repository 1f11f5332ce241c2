"""Python's front door: a model in one line, and what can be asked of it."""
