"""Golden Stick's layout, for vLLM-MindSpore and networks that Golden Stick builds."""
