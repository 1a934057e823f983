"""The networks, one folder per architecture; they read like their specifications. No word of ranks or kernels."""
