"""The rules: how the decomposer treats each kind of op."""
