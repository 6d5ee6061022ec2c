"""compressed-tensors, which transformers and vLLM read."""
