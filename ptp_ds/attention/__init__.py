"""How a token sees the tree."""
