"""What happens when a command is typed: one file a script, each composed of the wings below."""
