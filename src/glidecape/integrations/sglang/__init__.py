"""The tensors that GliDe inside SGLang needs: trees as SGLang verifies them, keys and values out of its pool.

Only the tensors: the worker that would use them is a design (docs/sglang.md). Nothing here imports SGLang, and nothing here was
ever run inside it; what its kernels do is taken from the sources of SGLang 0.5.23.
"""
