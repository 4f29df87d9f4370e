"""What a module is when it runs: steps over layers and ops, and its files."""
