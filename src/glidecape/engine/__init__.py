"""The decode loop: rounds, and the engine that runs them."""
