"""Hybrid CPU and GPU inference of Mixture-of-Experts models on unmodified llama.cpp."""

__version__ = "0.1.0"
