"""Distributed post-training quantisation of large language models on Ray and MindSpore."""

from gs_dist.processor import choose_blas_core

__version__ = "0.1.0"

choose_blas_core()  # here, since no module of the package can import NumPy before this one
