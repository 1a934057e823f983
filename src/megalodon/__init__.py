"""Megalodon language models with unlimited context (arXiv 2404.08801), on PyTorch. The public names, nothing else."""

__version__ = "0.1.0"
