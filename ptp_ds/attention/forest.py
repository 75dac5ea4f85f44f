"""Attention where blocks stand on several prefixes: each run of blocks sees its own one, by a tree's attention."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ptp_ds.attention.plan import TreePlan, plan_tree
from ptp_ds.attention.tree import KeysValues, attend_tree
from ptp_ds.packing.row import Block


@dataclass(frozen=True)
class ForestPlan:
    """How runs of consecutive blocks attend, each behind a prefix of its own.

    trees: a plan for each run, in order. prefixes: the number of each run's prefix among all. lengths: tokens of all
    prefixes, which lie one behind the other.
    """

    trees: tuple[TreePlan, ...]
    prefixes: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def blocks(self) -> tuple[Block, ...]:
        """All runs' blocks, in order."""
        return tuple(block for tree in self.trees for block in tree.blocks)


Plan = TreePlan | ForestPlan


def plan_forest(
    runs: Sequence[tuple[int, Sequence[Block]]], lengths: Sequence[int], device: torch.device | str,
    asked: Sequence[np.ndarray] | None = None,
) -> Plan:  # fmt: skip
    """The plan for runs of blocks, each with the number of its prefix. lengths: tokens of every prefix.

    asked: for each block of all runs the places that ask (see plan_tree). One prefix needs no forest.
    """
    trees, first = [], 0
    for number, blocks in runs:
        places = asked[first : first + len(blocks)] if asked is not None else None
        trees.append(plan_tree(blocks, 0, lengths[number], device, places))
        first += len(blocks)
    if len(lengths) == 1:
        return trees[0]
    return ForestPlan(tuple(trees), tuple(number for number, _ in runs), tuple(lengths))


def attend(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, plan: Plan, prefix: KeysValues | None = None, **how: Any
) -> Tensor:
    """attend_tree, or for a forest one tree after the other; prefix: keys and values of all prefixes."""
    if isinstance(plan, TreePlan):
        return attend_tree(q_THD, k_TKD, v_TKD, plan, prefix, **how)
    assert prefix is not None
    queries = q_THD.split([tree.query_slots.to_packed.shape[0] for tree in plan.trees])
    tokens = [tree.key_slots.to_packed.shape[0] for tree in plan.trees]
    # split, not slices: the backward of a slice fills a whole tensor with zeros, that of a split is one cat.
    own = zip(k_TKD.split(tokens), v_TKD.split(tokens), strict=True)
    behind = list(zip(*(x.split(plan.lengths) for x in prefix), strict=True))
    outs = [
        attend_tree(q, k, v, tree, behind[number], **how)
        for q, (k, v), tree, number in zip(queries, own, plan.trees, plan.prefixes, strict=True)
    ]
    return torch.cat(outs)
