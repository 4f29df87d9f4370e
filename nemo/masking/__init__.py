"""Masked neurons: their places, mask generators, losses on masks, class masks."""
