"""Many runs compared: studies over methods, tasks and seeds, landscapes, robustness; their tables and pictures."""
