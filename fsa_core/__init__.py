"""Flash Sparse Attention: attention over selected KV blocks, on the GPU (Triton) and the CPU (torch).

The public functions are in ``fsa_core.api``: importing the package itself imports no torch.
"""
