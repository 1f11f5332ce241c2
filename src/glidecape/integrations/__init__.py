"""GlideCape inside other libraries."""
