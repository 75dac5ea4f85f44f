"""The frozen model: packed scoring through transformers' public interfaces."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ptp_ds.attention.flash import flash_proven, try_flash
from ptp_ds.attention.interface import ATTENTION_NAME
from ptp_ds.attention.tree import attend_reference
from ptp_ds.backbone import verbalizers
from ptp_ds.backbone.activations import Activations
from ptp_ds.backbone.frozen_linear import replace_products
from ptp_ds.backbone.frozen_ops import replace_frozen
from ptp_ds.backbone.layerwise import LayerPass, LayerStack, PrefixCache, Section, use_layer_pass
from ptp_ds.backbone.sharding import Shards
from ptp_ds.backbone.trunks import RowPlan, SharedPrefix, plan_row, prefix_chunk
from ptp_ds.errors import UserError
from ptp_ds.kernels import Sources, pack_embed
from ptp_ds.models.heads import Head
from ptp_ds.models.positions import first_position, most_counted_tokens
from ptp_ds.packing.layouts import Rows, SeparateRows, TreeRows
from ptp_ds.packing.row import PackedRow, Trunk
from ptp_ds.packing.transfer import moved
from ptp_ds.prompts.deep import split_deep


class Backbone(nn.Module):
    """A transformers model that is never trained, never in train mode, and sees packed rows only.

    model: a *ForCausalLM, *ForMaskedLM or *ForSequenceClassification, as `head` says, whose attention goes through
    AttentionInterface and whose forward takes inputs_embeds and position_ids. Its files are neither copied nor patched:
    each layer object's forward follows backbone.layerwise, everything else is the family's own. Functions that take
    `trained` want all that is trained: the prompt's rows, then those of a trained head (ptp_ds.models.heads).
    """

    model: Any  # a transformers model; its methods are found at run time
    packs = True  # whether rows share one pass through layers of ours

    def __init__(
        self, model: Any, activations: Activations | None = None, prompt: str = "soft", head: Head | None = None,
        rows: Rows | None = None, kernels: str = "auto", joint: bool | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.kernels = kernels  # which implementation of ptp_ds.kernels runs
        # Whether products of one input are one (ptp_ds.backbone.joint_products), None: on a GPU; then which ones are.
        self.joint, self.joined = joint, ""
        self.prompt = prompt  # "soft": the prompt is token embeddings [P, H]; "deep": every layer's keys and values
        self.head = head or Head()
        self.rows: Rows = rows or TreeRows(prompt)
        self.first_position = first_position(model)
        self.model = model.eval().requires_grad_(False)
        self.activations = activations or Activations()
        self.takes_attention, self._own_attention = True, model.config._attn_implementation
        try:
            model.set_attn_implementation(ATTENTION_NAME)
        except (ValueError, ImportError, AttributeError):
            self.takes_attention = False
        layers = decoder_layers(model)
        self.shards = Shards(layers, model)
        with self.shards.layer(0):
            self.fused = replace_frozen(layers[0].modules() if layers else (), list(model.modules()), kernels)
        replace_products(model.modules(), kernels, self.shards.sharded)
        self.stack = LayerStack(layers, self.shards, getattr(model.config.get_text_config(), "num_hidden_layers", None))
        self.output = verbalizers.narrow_head(model)
        # What ptp_ds.backbone.check proves: logits of a few tokens alone, and less than a row for a causal head.
        self.narrows, self.head_input = False, self.head.head_input

    def try_kernels(self) -> None:
        """Tries what is tried before its first use, once a process: apart from passes whose memory is counted."""
        try_flash(self.device, self.dtype, attend_reference)

    def serve(self, prompt: str, rows: Rows, prompt_length: int = 0) -> None:
        """From now on: prompts of this kind and length, rows of this form."""
        self.prompt, self.rows = prompt, self.form_of(rows, prompt_length)

    def form_of(self, rows: Rows, prompt_length: int) -> Rows:
        """The form that these rows have where they are served: their own."""
        return rows

    @property
    def shares_passes(self) -> bool:
        """Whether rows behind several prompts can share a pass: not where each has a head of its own, nor padded."""
        return self.packs and not self.head.trained

    def release(self) -> None:
        """Gives the model its own layers and attention back."""
        self.stack.release()
        if self.output is not None:
            verbalizers.restore_head(self.output)
        if self.takes_attention:
            self.model.set_attn_implementation(self._own_attention)

    def train(self, mode: bool = True) -> "Backbone":
        """Stays in eval mode: a frozen model has no dropout, so both streams of a row see the same function."""
        return super().train(False)

    @property
    def width(self) -> int:
        """H: length of a token embedding."""
        return self.model.get_input_embeddings().embedding_dim

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def vocabulary(self) -> int:
        """V: rows of the token embedding."""
        embedding = self.model.get_input_embeddings()
        return getattr(embedding, "num_embeddings", None) or embedding.weight.shape[0]

    def embed_ids(self, token_ids: Sequence[int]) -> Tensor:
        """[n, H] fp32 frozen embeddings of token ids on the host, on the backbone's device."""
        return self.embed(torch.tensor(token_ids, device=self.device)).float()

    def embed(self, token_ids: Tensor) -> Tensor:
        """[T] -> [T, H] frozen token embeddings, no gradient."""
        with torch.no_grad(), self.shards.outside_layers():
            return self.model.get_input_embeddings()(token_ids)

    def inputs(
        self, row: PackedRow, trained: Tensor, shared_ids: Tensor | None = None, *, clean: bool = True,
        delta_TH: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """[N, H] embeddings of the prefix (SharedPrefix.ids), of the clean row and of the row that delta moves: what is
        asked.

        With the soft prompt, and its graph, where it stands in the prefix or in the blocks; and delta's, if it has one.
        """
        parts = [shared_ids] if shared_ids is not None else []
        ids_N = torch.cat(parts + [row.input_ids] * (clean + (delta_TH is not None)))
        delta_of = None
        if delta_TH is not None:
            own = row.moves_with if row.moves_with is not None else torch.arange(row.num_tokens, device=ids_N.device)
            delta_of = torch.cat([own.new_full((ids_N.shape[0] - row.num_tokens,), -1), own])
        has_prompt = shared_ids is not None or (row.slots is not None and row.slots.shape[0] > 0)
        return self.pack(ids_N, trained if has_prompt else None, delta_TH, delta_of)

    def pack(
        self, ids_N: Tensor, trained: Tensor | None, delta_SH: Tensor | None = None, delta_of: Tensor | None = None
    ) -> Tensor:
        """[N, H] tokens' embeddings, the prompt's row p for an id of -p - 1; see ptp_ds.kernels.pack_embed."""
        embedding = self.model.get_input_embeddings()
        with self.shards.outside_layers():
            if type(embedding) is nn.Embedding and embedding.max_norm is None:
                table = embedding.weight
            else:  # a family that scales its embeddings
                with torch.no_grad():
                    table = embedding(ids_N.clamp_min(0))
                ids_N = torch.where(ids_N < 0, ids_N, torch.arange(ids_N.shape[0], device=ids_N.device))
            prompt = table[:0] if trained is None else self.head.split(trained)[0]
            return pack_embed(table, prompt, Sources(ids_N, delta_of), delta_SH, impl=self.kernels)

    def narrow(self, row: PackedRow) -> PackedRow:
        """The row for logits of its verbalizers alone, where it and the head allow that; else the row as it is."""
        return row.narrowed() if self.narrows and row.verbalizers is not None else row

    def recomputed(self, tokens: int) -> int:
        """The first layers that a step over so many tokens, prompt and both streams, computes again in backward."""
        return self.activations.recomputed(tokens, self.stack.count)

    def plan(
        self, row: PackedRow, prefixes: Sequence[int], max_rows: int | None = None, device: torch.device | None = None
    ) -> RowPlan:
        """How the row goes through the layers, on the host: chunks of at most activations.chunk_tokens tokens (or one
        block) and max_rows blocks. prefixes: see prefix_lengths. device: where it will go; the row's for None.
        """
        most = self.activations.chunk_tokens
        most = min(most, most_counted_tokens(self.model.config) or most)
        flash = flash_proven(device or row.token_ids.device, self.dtype)
        return plan_row(row, prefixes, most, max_rows, flash)

    def prefix_lengths(self, row: PackedRow, prompt: int) -> tuple[int, ...]:
        """Tokens of each prefix that the row's blocks stand on. prompt: rows of the prompt, where it is one."""
        return self._lengths(row.trunks or (Trunk(0, prompt, row.shared_ids.shape[0]),))

    def _lengths(self, trunks: Sequence[Trunk]) -> tuple[int, ...]:
        if self.prompt == "soft" and isinstance(self.rows, SeparateRows):
            return (0,)
        return tuple(trunk.prompt + trunk.shared for trunk in trunks)

    def run(
        self, layer_pass: LayerPass, inputs_TH: Tensor, positions_T: Tensor, trained: Tensor | None = None,
        columns: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Logits [N, V] (or [N, classes]) at the scored positions of the pass' sections, in order.

        columns [n]: the tokens whose logits are wanted, for [N, n].
        """
        self.try_kernels()
        layer_pass.head_input = self.head_input
        arguments: dict[str, Any] = {
            "inputs_embeds": inputs_TH[None].clone(),  # some families scale what they are given in place
            "position_ids": positions_T[None] + self.first_position,
        }
        if self.head.kind == "causal":
            arguments["use_cache"] = False
            if not layer_pass.scores_anything:  # some kernels take no empty tensor
                layer_pass.head_input = "row"
            if layer_pass.head_input == "row":
                arguments["logits_to_keep"] = layer_pass.scored
        with use_layer_pass(layer_pass), verbalizers.use_columns(columns), self.shards.outside_layers():
            out = self.call_model(trained, **arguments)
        return out.logits if self.head.kind == "classes" else out.logits.squeeze(0)

    def call_model(self, trained: Tensor | None, **arguments: Any) -> Any:
        """The model's own forward, with the trained head's tensors in the place of its own."""
        if not self.head.trained:
            return self.model(**arguments)
        if trained is None:
            raise ValueError("A model with a trained head needs what is trained in every pass.")
        tensors = {name: tensor.to(self.dtype) for name, tensor in self.head.split(trained)[1].items()}
        return torch.func.functional_call(self.model, tensors, kwargs=arguments)

    def score(
        self,
        row: PackedRow,
        embeds_TH: Tensor,
        trained: Tensor | None = None,
        prefix: PrefixCache | None = None,
        max_rows: int | None = None,
        watch: Callable[[LayerPass], None] | None = None,
        narrow: bool = False,
        plan: RowPlan | None = None,
    ) -> Tensor:
        """Candidate log-probabilities [S, B, C] of a packed row in one pass; embeds_TH: see `inputs`.

        prefix: a cache of it, to attend to it without computing it again. max_rows: blocks that a layer handles in one
        go. watch: is handed the pass afterwards. narrow: whether scores may be logits that aren't normalised. plan: the
        row's (see `plan`), made before.
        """
        row = self.narrow(row) if narrow else row
        if trained is None and prefix is None:
            raise ValueError("score needs what is trained, a cached prefix, or both.")
        graph = torch.is_grad_enabled()
        source = SharedPrefix((_prefix_length(prefix or {}),))
        if prefix is None and trained is not None:
            source = self.prefix(trained, row.shared_ids, row.trunks)
        plan = plan or self.plan(row, source.lengths, max_rows).to(embeds_TH.device)
        assert plan.is_of(row, source.lengths), "a plan of another row"
        sections = [Section(chunk, graph, to_prefix=prefix is None) for chunk in plan.chunks]
        inputs, positions = embeds_TH, plan.positions(row)
        if source.ids is not None:
            sections.insert(0, Section(plan.prefix, graph))
            inputs = torch.cat([self.pack(source.ids, trained), embeds_TH])
            positions = torch.cat([source.positions(positions.device), positions])
        recomputed = self.recomputed(inputs.shape[0]) if graph else 0
        layer_pass = LayerPass(sections, {} if prefix is None else prefix, recomputed, given=source.keys_values)
        scores = row.scores(self.run(layer_pass, inputs, positions, trained, row.columns))
        if watch is not None:
            watch(layer_pass)
        return scores

    def prefix(self, trained: Tensor, shared_ids: Tensor | None = None, trunks: Sequence[Trunk] = ()) -> SharedPrefix:
        """What all rows stand on: a soft prompt and embeddings of `shared_ids` [I], or a deep prompt's keys and values.

        trunks: the row's, where its blocks stand on several prompts (PackedRow.trunks); their rows of `trained` lie
        there in the same order. Nothing where the soft prompt stands in every block. Raises ValueError for shared_ids
        behind a deep prompt: tokens behind it belong to the rows.
        """
        prompt = self.head.split(trained)[0]
        tokens = shared_ids if shared_ids is not None else torch.empty(0, dtype=torch.int64, device=prompt.device)
        trunks = trunks or (Trunk(0, prompt.shape[0], len(tokens)),)
        if self.prompt == "deep":
            if len(tokens):
                raise ValueError("A deep prompt's prefix holds no tokens; pack the rows with shared=0.")
            keys_values = split_deep(prompt.to(self.dtype), self.model.config)
            return SharedPrefix(self._lengths(trunks), keys_values=keys_values)
        if isinstance(self.rows, SeparateRows):
            return SharedPrefix(self._lengths(trunks))
        ids = -1 - torch.arange(prompt.shape[0], device=tokens.device)
        if len(trunks) > 1:
            prompts, shared = ids.split([t.prompt for t in trunks]), tokens.split([t.shared for t in trunks])
            ids = torch.cat([part for pair in zip(prompts, shared, strict=True) for part in pair])
        else:
            ids = torch.cat([ids, tokens])
        return SharedPrefix(self._lengths(trunks), ids=ids)

    def prefix_length(self, trained: Tensor, row: PackedRow) -> int:
        """Tokens that all rows stand on."""
        prompt = trained.shape[0] - self.head.rows(trained.shape[1])
        return self._lengths((Trunk(0, prompt, row.shared_ids.shape[0]),))[0]

    def cache_prefix(self, trained: Tensor, shared_ids: Tensor | None = None) -> PrefixCache:
        """Keys and values of the shared prefix for every layer, detached: computed once, used by any number of rows.

        shared_ids: those of the rows (PackedRow.shared_ids). Empty where there is no prefix.
        """
        prefix = self.prefix(trained, shared_ids)
        if prefix.ids is None:
            return prefix.detached().keys_values or {}
        return self.keys_of(self.pack(prefix.ids, trained), trained)

    def keys_of(self, inputs_IH: Tensor, trained: Tensor) -> PrefixCache:
        """Every layer's keys and values of `inputs_IH` as the only row, detached."""
        length, device = inputs_IH.shape[0], inputs_IH.device
        layer_pass = LayerPass([Section(moved(prefix_chunk((length,)), device), graph=False)], {})
        with torch.no_grad():
            self.run(layer_pass, inputs_IH.to(self.dtype), torch.arange(length, device=device), trained)
        return layer_pass.prefix

    def mean_embedding_norm(self, chunk: int = 16384) -> float:
        """Mean l2 norm over the vocabulary's embeddings: the unit of sigma and epsilon."""
        count = self.vocabulary
        total = 0.0
        with self.shards.outside_layers():
            for start in range(0, count, chunk):
                ids = torch.arange(start, min(start + chunk, count), device=self.device)
                total += self.embed(ids).float().norm(dim=-1).sum().item()
        return total / count


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The model's repeated layers: the members of its longest ModuleList."""
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=[])


def _prefix_length(prefix: PrefixCache) -> int:
    return next(iter(prefix.values()))[0][0].shape[0] if prefix else 0


class FamilyError(UserError):
    """A family that can't be served. why: the reason alone; finding: the sentence without what to do."""

    def __init__(self, model: Any, why: str) -> None:
        self.why = why
        self.finding = f"Model family {family_of(model)!r} ({type(model).__name__}) can't be served: {why}."
        super().__init__(
            f"{self.finding} Use one that goes through transformers' AttentionInterface (llama, mistral, qwen2, qwen3, "
            "gpt2, gpt_neox, opt, phi, gemma2, bert, ...)."
        )


def family_of(model: Any) -> str:
    """transformers' name of the model's family, its class's where it has none."""
    return getattr(model.config, "model_type", type(model).__name__)
