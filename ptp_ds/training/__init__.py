"""How the prompt is trained."""
