"""Slow, literal versions of the maths, to hold the fast ones against."""
