"""Trees, caches, masks, acceptance, noise and laws: pure, without a model."""
