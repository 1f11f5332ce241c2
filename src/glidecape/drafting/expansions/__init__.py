"""Expansions: how nodes are added below the frontier, one a file."""
