"""What a machine knows of itself and of others."""
