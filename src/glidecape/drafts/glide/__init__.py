"""GliDe."""
