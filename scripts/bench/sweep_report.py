"""What family_sweep.py prints and writes: a line a family, counts, docs/families.md."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from sweep_models import AUTO

from ptp_ds.backbone.families import PATHS, families_table

BOUND = 1e-4  # relative: scores in their deviation, gradients in their norm
ROUNDING = 1e-2  # a family that is exact in fp64 may be as far off as this in fp32: its own rounding, amplified
VERDICTS = ("ok", "wrong", "crash", "refused", "not built")
Result = dict[str, Any]
_LONGEST = 130  # characters of a reason
_NUMBERS = (
    "scores", "prompt", "delta", "head", "gaussian", "pgd", "deep", "sharded", "sharded step",
)  # fmt: skip


def numbers_of(found: Result) -> dict[str, float]:
    """The distances among what was found."""
    return {name: found[name] for name in _NUMBERS if name in found}


def line(key: str, found: Result) -> str:
    """One model's line of the table."""
    numbers = " ".join(f"{name} {value:.0e}" for name, value in numbers_of(found).items())
    words = [found.get("sentence", "")] if found["verdict"] != "crash" else []
    if found["verdict"] == "crash":
        words = [f"{found['stage']}: {found['error']} @ {found['frame']}"]
    words += found.get("notes", [])
    for weights, other in found.get("all", {}).items():
        paths = other["verdict"], other.get("path", "")
        if paths != (found["verdict"], found.get("path", "")):
            words.append(f"{weights} weights: {' '.join(paths).strip()}")
    name, kind = key.split()
    told = "; ".join(word for word in words if word)
    return f"{name:26} {kind:8} {found['verdict']:9} {found.get('path', ''):8} {numbers} {told}".rstrip()


def summary(results: dict[str, Result]) -> str:
    """Counts, then what needs mending."""
    lines = ["", f"{'':10}" + "".join(f"{verdict:>11}" for verdict in VERDICTS)]
    for kind in AUTO:
        counts = Counter(found["verdict"] for key, found in results.items() if key.split()[1] == kind)
        lines.append(f"{kind:10}" + "".join(f"{counts[verdict]:11}" for verdict in VERDICTS))
    for verdict, title in (("wrong", "Accepted and wrong"), ("crash", "Crashes")):
        chosen = [line(key, found) for key, found in sorted(results.items()) if found["verdict"] == verdict]
        lines += ["", f"{title}: {len(chosen)}", *chosen]
    return "\n".join(lines)


_PAGE = """\
# Model families

<!-- Written by scripts/bench/family_sweep.py --sharded --json FILE --markdown docs/families.md -->

Every causal, masked, classification and encoder-decoder family of {versions} was tried:
{count} tiny random models, with variants of windows, rotary scalings, experts and norms. Scores, the gradients of
prompt, deltas and a trained head, and those of whole steps with noise and with pgd are held against plain eager passes
of one example each, by input_ids; rows are ragged, in company, and longer than windows, attention chunks and original
rotary lengths.

{packed} are packed and {generic} are served on the generic path. Each is within {bound:g} of the plain passes
(relative), or within {rounding:g} where fp64 shows that this is rounding alone. {refused} are refused at start-up, in
one sentence. {sharded} of the packed ones were also loaded from files by two ranks under ZeRO-3: with the unsharded
model's scores and gradients in fp32, and its parameters and buffers in bf16, to the bit.

{served}

{paths}

Deep prompts are listed where they were tried: a family that compresses its keys takes none, and most encoders' have no
reference here. Any model is tried at start-up, listed or not; the table says what to expect.

## Refused

What the start-up check says in these versions. Most of them could be served, with work of their own.

| family | `--head` | why |
|---|---|---|
{why}

Not tried, because no tiny model of them could be built: {missing}.
"""


def markdown(results: Mapping[str, Result], versions: Mapping[str, str]) -> str:
    """docs/families.md: the table of the families that are served, then those that aren't, and why."""
    counts = Counter((found["verdict"], found.get("path", "")) for found in results.values())
    why = [
        "| {} | {} | {} |".format(*key.split(), reason(found))
        for key, found in sorted(results.items())
        if found["verdict"] == "refused"
    ]
    missing = sorted({key.split()[0] for key, found in results.items() if found["verdict"] == "not built"})
    return _PAGE.format(
        versions=" and ".join(f"{name} {version}" for name, version in versions.items()), count=len(results),
        packed=counts["ok", "packed"], generic=counts["ok", "generic"], refused=counts["refused", ""],
        sharded=sum("sharded" in found for found in results.values()), bound=BOUND, rounding=ROUNDING,
        served="\n".join(families_table()), paths="\n".join(f"{name}: {path}." for name, path in PATHS.items()),
        why="\n".join(why), missing=", ".join(missing),
    )  # fmt: skip


def reason(found: Result) -> str:
    """The part of a refusal that says why, on one line of a table."""
    said = found["sentence"].split("can't be served: ")[-1].split(" (allowed:")[0].replace("|", "/").rstrip(".")
    return said if len(said) <= _LONGEST else said[: said.rindex(" ", 0, _LONGEST)] + " ..."
