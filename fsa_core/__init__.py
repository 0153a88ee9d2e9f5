"""Flash Sparse Attention: attention over selected KV blocks, on the GPU (Triton) and the CPU (torch)."""
