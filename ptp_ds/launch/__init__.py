"""How ranks start, stop and start again."""
