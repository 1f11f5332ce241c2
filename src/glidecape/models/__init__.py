"""Networks: the target, standalone drafts and GliDe. They know nothing of drafting."""
