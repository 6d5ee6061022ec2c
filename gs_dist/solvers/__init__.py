"""Quantisation algorithms as pure functions: arrays in, arrays and an error out. NumPy and SciPy only."""
