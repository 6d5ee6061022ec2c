"""Checkpoint dialects of serving engines."""
