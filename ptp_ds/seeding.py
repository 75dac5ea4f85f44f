"""Random generators: one for each purpose, derived from (seed, purpose, numbers) and nothing else.

No generator carries state from step to step, so a resumed run and a run on another number of ranks draw the same.
"""

import hashlib

import torch


def derive_seed(seed: int, purpose: str, *numbers: int) -> int:
    """A 63-bit seed from the run's seed, a purpose ("order", "noise", ...) and numbers (step, example, epoch)."""
    text = "/".join([str(seed), purpose, *map(str, numbers)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def make_generator(seed: int, purpose: str, *numbers: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator on `device`, seeded with derive_seed."""
    return torch.Generator(device).manual_seed(derive_seed(seed, purpose, *numbers))
