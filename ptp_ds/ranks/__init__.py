"""What a process knows of the others."""
