"""Rows of an optimizer step where none are given: the default, in equal parts for all ranks and micro-batches."""

from collections.abc import Collection

from ptp_ds.config.run_config import RunConfig


def gives_batch(run: RunConfig, explicit: Collection[str]) -> bool:
    """Whether the user or a program said how large a batch is, by --batch_size or a budget in its place."""
    return run.tokens_per_step is not None or "batch_size" in explicit or run.batch_size != RunConfig.batch_size


def default_batch(hands: int) -> int:
    """The default of --batch_size, rounded up to a multiple of hands: ranks times micro-batches of each."""
    return -(-RunConfig.batch_size // hands) * hands
