"""Safetensors checkpoints on disk: reading, writing, merging. No network, no framework."""
