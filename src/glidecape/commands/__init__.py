"""Commands of `glidecape` that have a module of their own."""
