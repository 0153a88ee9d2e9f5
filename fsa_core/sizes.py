"""Arithmetic of sizes that plans, kernels and their callers share."""

INT32_BYTES = 4
FLOAT32_BYTES = 4


def power_of_two(size: int) -> int:
    """The next one."""
    return 1 << (size - 1).bit_length()


def padded_dim(dim: int) -> int:
    """The power of two that a tile holds ``dim`` channels in."""
    return max(16, power_of_two(dim))


def equal_parts(total: int, most: int) -> int:
    """The size of equal parts of ``total``, each at most ``most``."""
    return -(-total // -(-total // most))


def search_steps(num_sequences: int) -> int:
    """Steps of the binary search over ``num_sequences`` that the kernels take."""
    return max(num_sequences - 1, 0).bit_length()
