"""Tests, one folder a wing; tests.support holds what they share."""
