"""The target: any causal LM that decodes token trees on our cache."""
