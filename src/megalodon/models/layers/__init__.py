"""Modules that more than one architecture uses: norms, moving averages, attention, feed-forward; and fast forms."""
