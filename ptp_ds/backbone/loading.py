"""Loading a frozen backbone: whole under ZeRO-2, sharded tensor by tensor under ZeRO-3."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from ptp_ds.backbone.backbone import Backbone
from ptp_ds.backbone.sharded_loading import absent_parameters, build_sharded, fill_from_files, untied_in_files
from ptp_ds.backbone.sharding import ResolvedDeepSpeed
from ptp_ds.errors import UserError
from ptp_ds.files import brief
from ptp_ds.models.heads import Head, HeadPlan, auto_class, is_kept, is_trained, may_be_absent
from ptp_ds.models.quantised import require_plain_tensors
from ptp_ds.models.source import load_config
from ptp_ds.models.stored import StoredTensors, tensor_files
from ptp_ds.ranks.distributed import Ranks


def load_backbone(
    folder: Path, deepspeed_config: ResolvedDeepSpeed, ranks: Ranks, plan: HeadPlan | None = None,
    kernels: str = "auto", share: bool = False, joint: bool | None = None,
) -> Backbone:  # fmt: skip
    """The frozen backbone on this rank's device, in the resolved dtype; sharded over ranks under ZeRO-3.

    plan: the head it predicts with, a causal one by default. Tensors that a checkpoint lacks are refused, and those of
    another shape than config.json says, but for those of a classifier, which is trained. kernels: see ptp_ds.kernels.
    share: whether ranks of one host without GPUs may keep their shards in one memory (see Shards.share). joint: see
    Backbone.
    """
    plan, config = plan or HeadPlan(), load_config(folder)
    files = tensor_files(folder)
    require_plain_tensors(files)
    auto = auto_class(config, plan.kind, folder)
    if plan.kind == "classes":
        config.num_labels = plan.outputs
    model: Any
    if deepspeed_config.stage != 3:
        with _transformers_refusals(folder):
            model, info = auto.from_pretrained(
                folder, config=config, dtype=deepspeed_config.dtype, output_loading_info=True, use_safetensors=True,
                trust_remote_code=False, ignore_mismatched_sizes=plan.kind == "classes",
            )  # fmt: skip
        absent = set(info["missing_keys"])
        _refuse_absent(absent, plan, folder)
        for name, found, wanted in sorted(info["mismatched_keys"]):  # transformers made these anew, at random
            if not is_trained(name):
                raise UserError(f"{folder}: {name} has shape {tuple(found)}, its config.json says {tuple(wanted)}.")
        model = model.to(ranks.device)
    else:
        with _transformers_refusals(folder):
            model = build_sharded(
                config, deepspeed_config, auto, lambda new: untied_in_files(new, StoredTensors(new, files), ranks)
            )
        stored = StoredTensors(model, files)
        absent = absent_parameters(model, stored)
        _refuse_absent(absent, plan, folder)
        fill_from_files(model, stored, ranks, lambda name: plan.kind == "classes" and is_trained(name))
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters()}
    trained = {name: shape for name, shape in shapes.items() if is_trained(name) or name in absent}
    head = Head(plan.kind, plan.choice)
    if plan.kind == "classes":
        kept = {name: shape for name, shape in trained.items() if is_kept(name) and name not in absent}
        head = Head(plan.kind, plan.choice, trained, _held(model, files, kept))
    backbone = Backbone(model, head=head, kernels=kernels, joint=joint)
    if share:
        backbone.shards.share(ranks)
    return backbone


def _held(model: Any, files: Mapping[str, Path], wanted: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The files' values of the tensors of `wanted`, names and shapes, fp32. ValueError for one of another shape."""
    found: dict[str, Tensor] = {}
    if not wanted:
        return found
    stored = StoredTensors(model, files)
    for names, read in stored.groups(wanted):
        values = read()
        for name in names:
            if tuple(values[name].shape) != wanted[name]:
                raise UserError(
                    f"{stored.where(name)} has shape {tuple(values[name].shape)}, its config.json says {wanted[name]}."
                )
            found[name] = values[name].float()
    return found


_UNFIT = ("Error(s) in loading state_dict", "You set `ignore_mismatched_sizes`", "We encountered some issues during")


@contextmanager
def _transformers_refusals(folder: Path) -> Iterator[None]:
    """What transformers raises for a folder's config.json (a width that heads don't divide, a package that is needed),
    or for weights that don't fit it, is for the user."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, RuntimeError, ImportError) as error:
        said = " ".join(str(error).split())
        if isinstance(error, RuntimeError) and not said.startswith(_UNFIT):
            raise
        shown = brief(said)[1:-1].rstrip(".")
        raise UserError(
            f"{folder}: transformers can't build the model that config.json describes ({shown})."
        ) from error


def _refuse_absent(absent: set[str], plan: HeadPlan, folder: Path) -> None:
    """ValueError where the files lack tensors that nothing here trains."""
    missing = sorted(name for name in absent if plan.kind != "classes" or not may_be_absent(name))
    if missing:
        raise UserError(
            f"{folder} has no {missing[0]!r} and {len(missing) - 1} more of a {plan.kind} model; choose another --head "
            "or a folder that save_pretrained wrote of such a model."
        )
