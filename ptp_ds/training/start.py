"""How training starts: the backbone loaded and checked, the engine with the prompt's start or a checkpoint's state."""

from statistics import median

from torch import Tensor

from ptp_ds.backbone.activations import Activations, activations_on
from ptp_ds.backbone.backbone import Backbone
from ptp_ds.backbone.check import checked_backbone
from ptp_ds.backbone.frozen_linear import explain_product
from ptp_ds.backbone.frozen_ops import explain_fused
from ptp_ds.backbone.loading import load_backbone
from ptp_ds.config.run_config import RunConfig
from ptp_ds.kernels import explain
from ptp_ds.perturb.neighbours import Neighbours, vocabulary_of
from ptp_ds.perturb.units import unit_of, vanishes
from ptp_ds.prompts import Reparametrised, empty_prompts, initial_ids, prompt_width, reparametrised
from ptp_ds.prompts.deep import join_deep
from ptp_ds.ranks.distributed import Ranks
from ptp_ds.ranks.log import get_logger
from ptp_ds.training.engine import Engine
from ptp_ds.training.examples import require_rows_for
from ptp_ds.training.prepared import Prepared
from ptp_ds.training.progress import Progress, progress_from

log = get_logger(__name__)


def initial_trained(prepared: Prepared, backbone: Backbone) -> Tensor:
    """[P, H] the prompt's start, an adapter's or the initialiser's; for a deep one [P, D], its keys and values."""
    run, head = prepared.run, backbone.head
    start = head.start(prepared.source.config, run.seed)
    if _fits(prepared, backbone):
        start |= prepared.adapter_head
    tensors = {name: tensor.to(backbone.device) for name, tensor in start.items()}
    if prepared.adapter is not None:
        return head.join(prepared.adapter.to(backbone.device), tensors)
    ids = initial_ids(
        run.prompt_init, run.prompt_length, prepared.source.tokenizer, backbone.vocabulary, seed=run.seed,
        text=run.init_text, answers=prepared.examples.train[0].candidate_ids,  # the same in every row
    )  # fmt: skip
    prompt = backbone.embed_ids(ids)
    if run.prompt == "soft":
        return head.join(prompt, tensors)
    keys = backbone.keys_of(prompt, head.join(prompt, tensors))
    return head.join(join_deep(keys, prepared.source.config), tensors)


def _fits(prepared: Prepared, backbone: Backbone) -> bool:
    """Whether the classifier of --init_adapter has the tensors that the model's has; it may lack those of Head.held."""
    head, found = backbone.head, {name: tuple(tensor.shape) for name, tensor in prepared.adapter_head.items()}
    return found == {name: shape for name, shape in head.trained.items() if name in found or name not in head.held}


def neighbours_of(prepared: Prepared) -> Neighbours | None:
    """Near words for a perturbation that attacks the text; None for the others."""
    run = prepared.run
    if run.active_perturbation is None or run.active_perturbation.attack is None:
        return None
    return Neighbours(vocabulary_of(prepared.source.tokenizer), run.a2t_neighbours, run.a2t_min_cosine)


def open_backbone(prepared: Prepared, ranks: Ranks) -> Backbone:
    """The backbone, loaded, checked and serving the run's rows; says which path, activations and kernels it takes."""
    run, source = prepared.run, prepared.source
    backbone = load_backbone(source.folder, prepared.resolved, ranks, source.head_plan, run.kernels, share=True)
    backbone.activations = activations_on(ranks.device, run.activations, run.chunk_tokens)
    longest = run.prompt_length + prepared.examples.longest + prepared.rows.extra_tokens
    backbone, refused = checked_backbone(backbone, longest, ranks)
    backbone.serve(run.prompt, prepared.rows, run.prompt_length)
    backbone.activations = _scheduled(prepared, backbone, ranks)
    if prepared.adapter_head and not _fits(prepared, backbone):
        log.warning(
            "warning: the classifier of %s is left out, only its prompt is taken: this model's has other tensors",
            run.init_adapter,
        )
    if refused is not None:
        log.info("  generic path, padded and slower: %s", refused.finding)
        _warn_unheeded(run)
    if backbone.shards.shared and ranks.world > 1:
        log.info("  shards: one memory that the %d ranks of this host share; nothing is sent", ranks.world)
    elif backbone.shards.shared:
        log.info("  shards: whole on this rank, the only one; nothing is gathered")
    place = run.kernels, ranks.device, backbone.dtype
    log.info(
        "  activations: %s; kernels: %s; frozen products: %s, %s; fused layers: %s", backbone.activations.describe(),
        explain(*place), explain_product(*place), backbone.joined, explain_fused(backbone.fused),
    )  # fmt: skip
    return backbone


def require_served_rows(prepared: Prepared, backbone: Backbone, ranks: Ranks) -> None:
    """UserError where a batch of --tokens_per_step holds fewer rows than are needed (see require_rows_for), in the form
    that the backbone serves: on the generic path they are longer than those that were checked before it was loaded.
    """
    run = prepared.run
    if (rows := backbone.form_of(prepared.rows, run.prompt_length)) != prepared.rows:
        require_rows_for(run, rows, prepared.examples.train, ranks.world * run.gradient_accumulation_steps)


def _scheduled(prepared: Prepared, backbone: Backbone, ranks: Ranks) -> Activations:
    """How micro-batches go through the layers, the same on all ranks; all ranks must call it.

    On the generic path, whose layers are the family's own, all rows of a forward go through a layer at once: the
    micro-batches that are asked for are forwards of their own.
    """
    activations, checkpoint, wanted = backbone.activations, prepared.continuation.checkpoint, prepared.run.schedule
    if not backbone.packs and wanted == "auto" and prepared.run.gradient_accumulation_steps > 1:
        wanted = "depth"
    resident = backbone.shards.shared or not backbone.shards.sharded
    fit = -ranks.host_max(-activations.fit)
    before = checkpoint.micro_tokens if checkpoint is not None else None
    return activations.scheduled(wanted, resident, fit, before)


def _warn_unheeded(run: RunConfig) -> None:
    """Warns of settings that were given and that the generic path doesn't read: its layers are the family's own."""
    given = [f"--{name}" for name in ("activations", "chunk_tokens") if getattr(run, name) != getattr(RunConfig, name)]
    if given:
        log.warning(
            "warning: %s %s no effect on the generic path, which keeps all activations of a micro-batch; give more "
            "--gradient_accumulation_steps to save memory there", " and ".join(given),
            "have" if len(given) > 1 else "has",
        )  # fmt: skip


def made_from(prepared: Prepared) -> Reparametrised | None:
    """What is trained in the place of the run's prompt, if anything."""
    run = prepared.run
    return reparametrised(run.prompt, run.prompt_length, prepared.source.config, run.prompt_mlp, run.prompt_residual)


def open_engine(prepared: Prepared, ranks: Ranks) -> tuple[Engine, Progress]:
    """An engine around the backbone that holds the prompt's start or the checkpoint's state."""
    run, config = prepared.run, prepared.source.config
    backbone = open_backbone(prepared, ranks)
    require_served_rows(prepared, backbone, ranks)
    made = made_from(prepared)
    beside = backbone.head.rows(prompt_width(run.prompt, config))
    prompt, _ = empty_prompts(run.prompt, config, [run.prompt_length], [made], beside)
    engine = Engine(prompt, backbone, prepared.resolved, ranks, run.weight_decay, run.average)
    checkpoint = prepared.continuation.checkpoint
    if checkpoint is None:
        start = initial_trained(prepared, backbone)
        engine.set_prompt(start if made is None else made.start(start, run.seed))
        return engine, Progress()
    engine.load_state(checkpoint.tensors)
    return engine, progress_from(checkpoint)


def perturbation_unit(prepared: Prepared, backbone: Backbone) -> float:
    """What size 1 is in embedding coordinates, 1 without a perturbation; warns where the largest size is too small for
    the backbone's dtype: a token's, which of a Frobenius norm has a share."""
    run, dtype = prepared.run, prepared.resolved.dtype
    if run.active_perturbation is None:
        return 1.0
    mean_norm = backbone.mean_embedding_norm()
    unit = unit_of(run.units, mean_norm, backbone.width)
    shares = {"sigma": 1.0, "epsilon": 1.0}
    if run.norm == "frobenius" and "norm" in run.active_perturbation.reads:
        shares["epsilon"] = median(max(1, sum(example.movable)) for example in prepared.examples.train) ** -0.5
    sizes = [getattr(run, name) * share for name, share in shares.items() if name in run.active_perturbation.sizes]
    if sizes and vanishes(max(sizes) * unit, mean_norm, dtype):
        log.warning(
            "warning: deltas of norm %.1e on a token are mostly lost beside embeddings of norm %.1e in %s; use "
            "--precision fp32 or larger sizes", max(sizes) * unit, mean_norm, dtype,
        )  # fmt: skip
    return unit
