"""The load generator behind ``fsa bench``."""
