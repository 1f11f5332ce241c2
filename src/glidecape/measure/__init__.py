"""The papers' studies on any target and drafts: CaPE's siblings, SVIP's length, batches, contexts, long outputs."""
