"""Every model family that the installed transformers has, as the project serves it, against plain eager passes.

    python scripts/bench/family_sweep.py --json sweep.json [--only NAME ...] [--heads causal masked classes seq2seq]

For each family and head a tiny random model (sweep_models.py) is given to the project, which packs it, pads it or
refuses it. Where it doesn't refuse, scores and gradients are compared with those of an untouched copy that is fed one
example at a time by input_ids (sweep_compare.py). Each family runs in a process of its own. Exit code 1: a family is
accepted and wrong, or crashes.
"""

import argparse
import json
import logging
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers
from sweep_compare import (
    PROMPT,
    Case,
    Plain,
    compare_deep,
    compare_gradients,
    compare_scores,
    compare_step,
    distance,
    head_of,
    make_case,
    rows_of,
)
from sweep_models import AUTO, LABELS, WEIGHTS, Recipe, families, make_config, make_model
from sweep_report import BOUND, ROUNDING, Result, line, markdown, numbers_of, summary
from sweep_sharded import compare_sharded

from ptp_ds.backbone.backbone import Backbone
from ptp_ds.backbone.check import checked_backbone
from ptp_ds.errors import UserError
from ptp_ds.models.heads import HeadPlan
from ptp_ds.models.positions import row_room

HALF = 0.2  # in bf16, where DeepSpeed's linear adds a bias after rounding
_FP32_IN_BF16 = 2.0**16  # how much coarser bf16 is: what its own rounding makes of a family
EXACT = 1e-5  # relative, fp64; some compute parts in fp32 whatever they are given
LONGEST_ROW = 43  # tokens behind the prompt
SAME_INPUTS = 1e-5  # how far inputs_embeds may be from input_ids to be called the same


class VerdictError(Exception):
    """Ends a family's examination with what is known of it."""

    def __init__(self, **found: Any) -> None:
        super().__init__()
        self.found = found


def place_of(error: BaseException) -> str:
    """The innermost line of ptp_ds in an error's traceback, else its innermost line."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/ptp_ds/" in frame.filename] or frames
    return f"{'/'.join(Path(ours[-1].filename).parts[-2:])}:{ours[-1].lineno}"


def first_line(error: BaseException) -> str:
    """An error's type and what it says in one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def crash(error: BaseException, stage: str) -> VerdictError:
    """What is said of an error that no user should see."""
    return VerdictError(verdict="crash", stage=stage, error=first_line(error), frame=place_of(error))


def ask_project(recipe: Recipe) -> tuple[Backbone, str, int]:
    """(a backbone that serves the family, why it isn't packed, the room of its rows), as a run gets them."""
    stage, kind = "row_room", recipe.kind
    try:
        room = row_room(None, PROMPT, recipe.config, HeadPlan(kind, False, LABELS))
        model = make_model(recipe, eager=False)
        stage = "constructor"
        backbone = Backbone(model, head=head_of(model, kind))
        stage = "check"
        backbone, refused = checked_backbone(backbone, PROMPT + min(room, LONGEST_ROW))
        backbone.serve("soft", rows_of(kind), PROMPT)
    except ValueError as error:
        sentence, last = str(error).split(" Use one ")[0], traceback.extract_tb(error.__traceback__)[-1].filename
        if "/ptp_ds/" not in last:
            sentence = f"[said by {Path(last).name}] {sentence}"
        raise VerdictError(verdict="refused", path="", sentence=sentence, frame=place_of(error)) from None
    except Exception as error:
        raise crash(error, stage) from None
    return backbone, refused.finding if refused else "", room


def known_inputs(case: Case) -> str:
    """Makes the plain model take embeddings, so that gradients can be had: inputs_embeds where they mean the same as
    input_ids, else by a hook. Returns how inputs_embeds differ, if they do."""
    examples, plain = case.shapes[0], case.plain
    wanted, said = case.truth(examples, case.trained), ""
    plain.how = "embeds"
    try:
        apart = distance(case.truth(examples, case.trained), wanted)
        if apart <= SAME_INPUTS:
            return ""
        said = f"inputs_embeds differs from input_ids by {apart:.1e}"
    except Exception as error:
        said = f"inputs_embeds isn't taken ({first_line(error)})"
    plain.how = "hook"
    try:
        apart = distance(case.truth(examples, case.trained), wanted)
    except Exception:
        apart = float("inf")
    if apart > SAME_INPUTS:
        plain.how = "ids"  # no gradient
    return said


def measure(recipe: Recipe, tell: Callable[[str], None], eager: bool = True) -> Result:
    """Path, numbers and notes of one model in one precision; eager: the plain passes' attention, else the default."""
    tell("check")
    backbone, reason, room = ask_project(recipe)
    found: Result = {"path": "packed" if backbone.packs else "generic", "notes": [], "unpacked": reason}
    tell("plain passes")
    case = make_case(Plain(make_model(recipe, eager), recipe.kind), backbone, room)
    longest = max(len(example.context_ids) for example in case.shapes[0])
    if longest < 40:
        found["notes"].append(f"the project holds rows to {room} tokens behind the prompt")
    try:
        with torch.no_grad():
            again = distance(case.truth(case.shapes[0], case.trained), case.truth(case.shapes[0], case.trained))
            if again > SAME_INPUTS:
                found["notes"].append(f"its own scores are random ({again:.1e})")
            if recipe.kind == "causal" and case.plain.looks_ahead(case.shapes[0][0].context_ids):
                found["notes"].append("it isn't causal")
            differs = known_inputs(case)
            how, case.plain.how = case.plain.how, "ids"
    except Exception as error:
        raise VerdictError(
            **found, verdict="wrong", sentence=f"accepted, but its plain pass fails: {first_line(error)}"
        ) from None
    found["notes"] += [differs] if differs else []
    tell("scores")
    found["scores"] = guarded(lambda: compare_scores(case), "scores", found)
    case.plain.how = how
    if how == "ids":
        found["notes"].append("no plain gradient to compare with")
        return found
    tell("gradients")
    found |= guarded(lambda: compare_gradients(case), "gradients", found)
    for perturbation in ("gaussian", "pgd"):
        tell(perturbation)
        found[perturbation] = guarded(lambda name=perturbation: compare_step(case, name), perturbation, found)
    if recipe.kind == "causal" and backbone.packs:
        tell("deep")
        with suppress(UserError):  # --prompt soft alone
            found["deep"] = guarded(lambda: compare_deep(case), "deep", found)
    if recipe.sharded and backbone.packs and recipe.dtype == torch.float32:
        tell("sharded")
        found |= guarded(lambda: judge_sharded(case, recipe, found), "sharded", found)
        found["notes"] += [f"sharded: refused ({found['not sharded']})"] if "not sharded" in found else []
    return found


def judge_sharded(case: Case, recipe: Recipe, found: Result) -> Result:
    """Numbers of the family on two ranks, or why it isn't sharded; tensors that differ are as wrong as can be."""
    report = compare_sharded(case, recipe)
    if "error" in report:
        raise RuntimeError(report["error"])
    if "refused" in report:
        return {"not sharded": report["refused"]}
    differs = report.pop("differs")
    if differs or report["sharded bf16"] > max(HALF, _FP32_IN_BF16 * found["scores"]):
        return {**report, "sharded": float("inf"), "differs": differs}
    return report


def guarded(compute: Callable[[], Any], stage: str, found: Result) -> Any:
    """What `compute` returns; its errors are crashes of the project, or more of what is wrong already."""
    try:
        return compute()
    except UserError:
        raise
    except Exception as error:
        ended = crash(error, stage).found
        if max(numbers_of(found).values(), default=0.0) > BOUND:
            ended |= {"verdict": "wrong", "sentence": f"and crashes in {stage}: {ended['error']} @ {ended['frame']}"}
        raise VerdictError(**(found | ended)) from None


def examine(name: str, kind: str, weights: str, tell: Callable[[str], None], sharded: bool = False) -> Result:
    """The verdict on one model with weights of one size; sharded: on two ranks, too."""
    tell("not built")
    try:
        recipe = Recipe(make_config(name, kind), kind, weights, sharded=sharded)
        make_model(recipe, eager=True)
    except Exception as error:
        return {"verdict": "not built", "sentence": first_line(error)}
    try:
        found = measure(recipe, tell)
    except VerdictError as ended:
        return ended.found
    worst = max(numbers_of(found).values())
    if worst <= BOUND:
        return found | {"verdict": "ok"}
    with suppress(VerdictError):
        usual = measure(recipe, lambda stage: tell(f"default attention {stage}"), eager=False)
        if max(numbers_of(usual).values()) <= BOUND:
            usual["notes"].append(f"as its default attention, from which its own eager one differs by {worst:.0e}")
            return usual | {"verdict": "ok"}
    try:
        exact = measure(replace(recipe, dtype=torch.float64), lambda stage: tell(f"fp64 {stage}"))
        found["fp64"] = max(numbers_of(exact).values())
        found["notes"].append(f"{found['fp64']:.0e} in fp64")
    except VerdictError as ended:
        found["notes"].append(f"fp64: {ended.found.get('error') or ended.found.get('sentence')}")
    if worst <= ROUNDING and found.get("fp64", 1.0) <= EXACT:
        found["notes"].append("fp32 rounding alone")
        return found | {"verdict": "ok"}
    return found | {"verdict": "wrong"}


def examine_all(name: str, kind: str, tell: Callable[[str], None], sharded: bool) -> Result:
    """The verdict on one model: the first wrong or crashing one of its weights, else that of the large ones.

    Small weights are tried where large ones aren't packed: where they are, the check can't have missed anything.
    """
    found: dict[str, Result] = {}
    for weights in WEIGHTS:
        found[weights] = examine(
            name, kind, weights, lambda stage, size=weights: tell(f"{size} weights, {stage}"), sharded
        )
        same = found[weights].get("stage") in ("row_room", "constructor") or found[weights].get("path") == "packed"
        if same or found[weights]["verdict"] == "not built":
            break
    worst = min(found, key=lambda size: {"wrong": 0, "crash": 1}.get(found[size]["verdict"], 2))
    return found[worst] | {"weights": worst, "all": found}


def _say(tell: Callable[[str], None], weights: str, stage: str) -> None:
    tell(f"{weights} weights, {stage}")


def child(name: str, kind: str, to_parent: Connection, quiet: bool, sharded: bool) -> None:
    """Examines one model and sends stages, then the result."""
    if quiet:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
    to_parent.send(examine_all(name, kind, to_parent.send, sharded))


def watched(name: str, kind: str, limit: float = 120.0, quiet: bool = True, sharded: bool = False) -> Result:
    """The result of a child process, or how it died."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(name, kind, sender, quiet, sharded))
    started = time.monotonic()
    process.start()
    sender.close()
    message: Any = "start"
    died = ""
    while isinstance(message, str):
        stage = message
        if not receiver.poll(max(0.0, started + limit - time.monotonic())):
            died = f"timeout after {limit:.0f} s"
            break
        try:
            message = receiver.recv()
        except EOFError:
            process.join(10)
            died = f"the process died with exit code {process.exitcode}"
            break
    process.kill()
    process.join()
    seconds = round(time.monotonic() - started, 1)
    if died:
        verdict = "not built" if stage.endswith(("start", "not built", "plain passes")) else "crash"
        message = {"verdict": verdict, "stage": stage, "error": died, "sentence": died, "frame": ""}
    return message | {"seconds": seconds}


def main() -> int:
    """The sweep; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="all numbers; what it holds already isn't run again")
    parser.add_argument("--again", action="store_true", help="run also what --json holds already")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these families alone, with their variants")
    parser.add_argument("--heads", nargs="+", choices=list(AUTO), default=list(AUTO))
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for each family")
    parser.add_argument("--verbose", action="store_true", help="show what libraries print")
    parser.add_argument("--markdown", type=Path, help="write the table of all that --json holds")
    parser.add_argument("--sharded", action="store_true", help="packed families on two ranks under ZeRO-3, too")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    known: dict[str, Result] = {}
    versions = {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0]}
    if arguments.json and arguments.json.is_file():
        known = json.loads(arguments.json.read_text())["results"]
    chosen: dict[str, Result] = {}
    for name, kind in families(arguments.heads):
        key = f"{name} {kind}"
        if arguments.only and not {name, name.split("+")[0]} & set(arguments.only):
            continue
        if arguments.again or key not in known:
            known[key] = watched(name, kind, arguments.limit, not arguments.verbose, arguments.sharded)
            if arguments.json:
                arguments.json.write_text(json.dumps({"versions": versions, "results": known}, indent=1))
        chosen[key] = known[key]
        print(line(key, known[key]), flush=True)
    print(summary(chosen))
    if arguments.markdown:
        arguments.markdown.write_text(markdown(known, versions), encoding="utf-8")
    return 1 if any(found["verdict"] in ("wrong", "crash") for found in chosen.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
