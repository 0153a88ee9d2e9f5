"""Benchmarks: real-looking data, everything compiled first, the median of many, peers in the same run."""
