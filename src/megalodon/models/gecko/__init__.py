"""Gecko (arXiv 2601.06463; GECKO): what its config, state, block and single-token step are."""
