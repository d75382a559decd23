"""Stable Diffusion served over BentoML with step-level continuous batching."""

__version__ = "0.1.0"
