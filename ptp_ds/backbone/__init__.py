"""How the frozen model runs."""
