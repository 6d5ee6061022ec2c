"""Distributed post-training quantisation of large language models on Ray and MindSpore."""

__version__ = "0.1.0"
