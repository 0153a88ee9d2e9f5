"""Native Sparse Attention (arXiv 2502.11089): compression, selection, sliding window and their gated sum.

The functions are in ``fsa_core.nsa.functional``, the layer in ``fsa_core.nsa.module``.
"""
