"""How a batch becomes one row."""
