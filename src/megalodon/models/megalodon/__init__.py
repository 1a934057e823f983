"""Megalodon (arXiv 2404.08801; SPEC): what its config, state, block and single-token step are."""
