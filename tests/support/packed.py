"""What packed passes are compared with: a prompt, and losses by one plain forward a candidate and stream."""

from dataclasses import replace

import torch
import torch.nn.functional as F

from ptp_ds.config.run_config import RunConfig
from tests.support.reference import make_model, plain_scores


def make_prompt(dtype=torch.float32):
    return 0.3 * torch.randn(5, 32, generator=torch.Generator().manual_seed(1)).to(dtype)


def divergence(kind, clean, perturbed, gold):
    """One example's divergence, written from its definition."""
    p, q = clean.softmax(-1), perturbed.softmax(-1)
    middle = (p + q) / 2
    return {
        "kl": (p * (p / q).log()).sum(),
        "sym_kl": (p * (p / q).log()).sum() + (q * (q / p).log()).sum(),
        "js": ((p * (p / middle).log()).sum() + (q * (q / middle).log()).sum()) / 2,
        "ce": -q[gold].log(),
    }[kind]


def symmetric_run(perturbation, **sizes):
    """The settings of the plain passes here: sym_kl at 0.7, its gradient to both predictions."""
    return RunConfig(
        perturbation=perturbation, divergence="sym_kl", divergence_gradient="both", reg_weight=0.7, **sizes
    )  # fmt: skip


def plain_step(family, prompt, examples, deltas, kind, weight):
    """Summed loss by one forward a candidate and stream, with eager attention."""
    model = make_model(family)
    total, first = 0.0, 0
    for example in examples:
        clean = plain_scores(model, prompt, example)
        total = total + F.cross_entropy(clean[None], torch.tensor([example.gold]))
        if deltas is not None:
            delta = deltas[first : first + len(example.context_ids)]
            first += example.packed_length
            perturbed = plain_scores(model, prompt, example, delta)
            total = total + weight * divergence(kind, clean, perturbed, example.gold)
    return total


def twin_deltas(row, twins, delta):
    """Each example's delta [L, H] on its changed context."""
    if delta is None:
        return [torch.zeros(len(twin.context_ids), 32) for twin in twins]
    found = []
    for twin, moved, part in zip(twins, row.movable.split(row.lengths), delta.split(row.lengths), strict=True):
        context = torch.zeros(len(twin.context_ids), 32)
        context[torch.tensor(twin.movable)] = part[moved]
        found.append(context)
    return found


def plain_twin_gradient(family, prompt, examples, contexts, deltas):
    """(summed loss, its gradient) of contexts and their changed twins, sym_kl at 0.7, by one forward a candidate."""
    plain, total, model = prompt.detach().clone().requires_grad_(), 0.0, make_model(family)
    for example, context, moved in zip(examples, contexts, deltas, strict=True):
        clean = plain_scores(model, plain, example)
        perturbed = plain_scores(model, plain, replace(example, context_ids=context), moved)
        total = total + F.cross_entropy(clean[None], torch.tensor([example.gold]))
        total = total + 0.7 * divergence("sym_kl", clean, perturbed, example.gold)
    return total, torch.autograd.grad(total, plain)[0]
