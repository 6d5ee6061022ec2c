"""GPTQ checkpoints: the layout that AutoGPTQ began and GPTQModel keeps."""
