"""What a run leaves behind, and who reads it."""
