"""What tests share: plain references, tiny models, processes, and the scripts that tests start."""
