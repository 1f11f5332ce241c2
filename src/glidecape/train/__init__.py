"""Training: corpora, the target of the demo, and drafts."""
