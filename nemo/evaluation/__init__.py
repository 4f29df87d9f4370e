"""Accuracies, class masks and sizes of what was trained (paper section 5)."""
