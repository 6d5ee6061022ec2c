"""ModelSlim's layout, which vLLM-Ascend reads."""
