"""Groups of examples whose contexts begin alike (MultiRC's answers to one passage), packed for scoring alone."""

from collections.abc import Sequence

from ptp_ds.packing.row import PackedRow, Packer
from ptp_ds.tasks.example import Example


def share_contexts(examples: Sequence[Example], budget: int) -> list[list[int]]:
    """Numbers of neighbouring examples that share at least half of their contexts, up to `budget` tokens a group."""
    groups: list[list[int]] = []
    common = alone = 0  # of the last group: tokens at the start of all its contexts, tokens without sharing
    for number, example in enumerate(examples):
        if groups:
            group = groups[-1]
            shared = _common(examples[group[0]].context_ids[:common], example.context_ids)
            longest = max(len(examples[group[-1]].context_ids), len(example.context_ids))
            total = alone + example.packed_length
            if 2 * shared >= longest and total - len(group) * shared <= budget:
                group.append(number)
                common, alone = shared, total
                continue
        groups.append([number])
        common, alone = len(example.context_ids) - 1, example.packed_length
    return groups


def group_length(group: Sequence[Example]) -> int:
    """Packed tokens of a group whose common start stands in the row once."""
    common = _group_common(group)
    return common + sum(example.packed_length - common for example in group)


def pack_groups(groups: Sequence[Sequence[Example]], shared: int = 0) -> PackedRow:
    """Packs groups of examples for scoring alone: what a group's contexts begin with stands in the row once.

    A block is a group: the common start, then each example's rest with its candidates. shared: as in pack.
    """
    packer = Packer([example for group in groups for example in group], 1, shared)
    number = 0
    for group in groups:
        common = max(_group_common(group), shared)
        start = packer.segment(group[0].context_ids[shared:common], [False] * (common - shared), -1)
        for example in group:
            context = packer.segment(example.context_ids[common:], example.movable[common:], start)
            packer.answers(number, 0, context)
            number += 1
        packer.close()
    return packer.row()


def _group_common(group: Sequence[Example]) -> int:
    common = len(group[0].context_ids) - 1
    for example in group[1:]:
        common = _common(group[0].context_ids[:common], example.context_ids)
    return common if len(group) > 1 else 0


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the longest common start that leaves `right` a token of its own."""
    most = min(len(left), len(right) - 1)
    return next((place for place in range(most) if left[place] != right[place]), max(0, most))
