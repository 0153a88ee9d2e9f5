"""What a user reads and runs; benchmarks take their model from here."""
