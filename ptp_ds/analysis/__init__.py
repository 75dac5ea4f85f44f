"""What trained prompts show: studies over methods, tasks and seeds, landscapes, robustness; tables and pictures."""
