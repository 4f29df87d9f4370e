"""Edits of the traced graph, before it is cut."""
