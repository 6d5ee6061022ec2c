"""Checkpoints to convert: any directory of safetensors, and the weights in it, in floats or quantised already."""
