"""The start-up check against families that it once accepted wrongly, and those that it once couldn't look at.

Every model is tiny and random, with weights large enough that what they do shows.
"""

from types import SimpleNamespace

import pytest
import torch
import transformers
from torch.nn.functional import log_softmax

from ptp_ds.backbone import backbone as backbone_module
from ptp_ds.backbone.activations import Activations
from ptp_ds.backbone.backbone import Backbone
from ptp_ds.backbone.check import check_backbone, checked_backbone
from ptp_ds.backbone.probe import InParts
from ptp_ds.backbone.sharded_loading import build_sharded, fill_randomly
from ptp_ds.backbone.sharding import Traffic
from ptp_ds.config.ds_config import read_ds_config, resolve_ds_config
from ptp_ds.config.run_config import RunConfig
from ptp_ds.models.heads import Head
from ptp_ds.models.positions import checked_length, max_row_length, most_counted_tokens, window_lengths
from ptp_ds.packing.row import pack
from tests.support.reference import make_examples, make_model, relative_error

SIZES = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
DECODER = {
    "vocab_size": 99, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 128,
    "pad_token_id": 1, "decoder_start_token_id": 2, "bos_token_id": 0, "eos_token_id": 2, "scale_embedding": True,
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}


def build(name, config, deviation=0.2, **settings):
    """A model of a class by its name, norms about 1, stored buffers not zero; deviation: that of its weights."""
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**settings)).float().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(deviation * torch.randn(weight.shape) + (weight.dim() == 1))
        stored = model.state_dict().keys()
        for buffer_name, buffer in model.named_buffers():
            if buffer_name in stored and buffer.is_floating_point():
                buffer.add_(0.3 * torch.randn(buffer.shape))
    return model


def refused(name, config, kind, longest=0, deviation=0.2, **settings):
    """The sentence that refuses a model, on the packed path and the generic one."""
    model = build(name, config, deviation, **settings)
    trained = {n: tuple(p.shape) for n, p in model.named_parameters() if n.split(".")[0] == "classifier"}
    with pytest.raises(ValueError, match="can't be served") as error:
        checked_backbone(Backbone(model, head=Head(kind, trained=trained if kind == "classes" else {})), longest)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "config", "kind", "settings"),
    [
        ("FalconH1ForCausalLM", "FalconH1Config", "causal",
         {**SIZES, "embedding_multiplier": 3.0, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8,
          "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 16, "head_dim": 8}),
        ("PegasusForConditionalGeneration", "PegasusConfig", "seq2seq", DECODER),
        ("MarianMTModel", "MarianConfig", "seq2seq", {**DECODER, "decoder_vocab_size": 99}),
        ("MvpForConditionalGeneration", "MvpConfig", "seq2seq", DECODER),
        ("BlenderbotSmallForConditionalGeneration", "BlenderbotSmallConfig", "seq2seq", DECODER),
    ],
)  # fmt: skip
def test_what_a_family_does_to_tokens_outside_its_embedding(name, config, kind, settings):
    """Scales that inputs_embeds doesn't go through: a prompt of real tokens by input_ids shows them."""
    assert "its forward does more to tokens than to embeddings" in refused(name, config, kind, **settings)


SMALL = {
    "pegasus": ("PegasusForConditionalGeneration", "PegasusConfig", "seq2seq", DECODER),
    "marian": ("MarianMTModel", "MarianConfig", "seq2seq", {**DECODER, "decoder_vocab_size": 99}),
    "blenderbot-small": (
        "BlenderbotSmallForConditionalGeneration", "BlenderbotSmallConfig", "seq2seq", DECODER),
    "prophetnet": (
        "ProphetNetForConditionalGeneration", "ProphetNetConfig", "seq2seq",
        {"vocab_size": 99, "hidden_size": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_encoder_layers": 2,
         "num_decoder_layers": 2, "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4,
         "max_position_embeddings": 128, "num_buckets": 8, "relative_max_distance": 16}),
    "convbert": (
        "ConvBertForMaskedLM", "ConvBertConfig", "masked",
        {**SIZES, "embedding_size": 32, "head_ratio": 2, "conv_kernel_size": 3}),
}  # fmt: skip


@pytest.mark.parametrize("family", SMALL)
def test_small_weights_hide_nothing(family):
    """As a library initialises them: what is wrong is little, but so is all that the scores tell apart."""
    name, config, kind, settings = SMALL[family]
    refused(name, config, kind, longest=60, deviation=0.02, **settings)


def test_a_family_that_rounds_more_than_others_is_no_worse_for_it():
    """roberta-prelayernorm has no norm behind its layers: gradients move by 1e-4 with the last digit of its inputs."""
    model = build("RobertaPreLayerNormForSequenceClassification", "RobertaPreLayerNormConfig", **SIZES, num_labels=3)
    trained = {n: tuple(p.shape) for n, p in model.named_parameters() if n.split(".")[0] == "classifier"}
    check_backbone(Backbone(model, head=Head("classes", trained=trained)), 60)


def test_longer_answers_hide_nothing(monkeypatch):
    """Hundredths of what scores of small weights know are wrong: far less than an answer's length makes of them."""
    backbone = Backbone(build("LlamaForCausalLM", "LlamaConfig", 0.02, **SIZES))
    check_backbone(backbone)
    real = Backbone.score

    def wrong(self, row, *args, **more):
        scores = real(self, row, *args, **more)
        return scores + 0.003 * torch.cos(torch.arange(scores.shape[-1]))

    monkeypatch.setattr(Backbone, "score", wrong)
    with pytest.raises(ValueError, match="packed scores differ"):
        check_backbone(backbone)


def test_a_family_whose_state_is_written_in_place():
    """rwkv's plain pass has no gradient unless it is told to keep no state."""
    settings = {"vocab_size": 99, "hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2,
                "intermediate_size": 48, "context_length": 128}  # fmt: skip
    backbone, reason = checked_backbone(Backbone(build("RwkvForCausalLM", "RwkvConfig", **settings)))
    assert reason
    assert not backbone.packs


def test_a_family_that_needs_its_tokens():
    """esm drops and rescales tokens that it is given; without them it fails."""
    settings = {**SIZES, "token_dropout": True, "mask_token_id": 4, "position_embedding_type": "rotary"}
    refused("EsmForMaskedLM", "EsmConfig", "masked", **settings)


@pytest.mark.parametrize("kind", ["masked", "classes"])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("ConvBert", {**SIZES, "embedding_size": 32, "head_ratio": 2, "conv_kernel_size": 3}),
        ("Yoso", {**SIZES, "num_hash": 4, "hash_code_len": 4}),
    ],
)
def test_rows_that_see_their_neighbours_or_their_padding(name, settings, kind):
    """Convolutions over the batch's row, hashes of all its tokens: a row in company isn't the row alone."""
    head = "MaskedLM" if kind == "masked" else "SequenceClassification"
    sentence = refused(f"{name}For{head}", f"{name}Config", kind, **settings)
    assert "differ from plain ones" in sentence


@pytest.mark.parametrize("kind", ["masked", "classes"])
def test_three_tokens_at_once(kind):
    """mobilebert's inputs take their neighbours along: across packed rows, but not across padded ones."""
    head = "MaskedLM" if kind == "masked" else "SequenceClassification"
    settings = {**SIZES, "embedding_size": 16, "intra_bottleneck_size": 16, "num_key_value_heads": 4}
    model = build(f"MobileBertFor{head}", "MobileBertConfig", **settings)
    trained = {n: tuple(p.shape) for n, p in model.named_parameters() if n.split(".")[0] == "classifier"}
    backbone, reason = checked_backbone(Backbone(model, head=Head(kind, trained=trained if kind == "classes" else {})))
    assert not backbone.packs
    assert "can't be served" in str(reason)


def test_a_forward_that_changes_the_model_for_good():
    """big_bird's first short row turns its sparse attention off, for all rows that come later."""
    settings = {**SIZES, "attention_type": "block_sparse", "block_size": 4, "num_random_blocks": 1}
    assert "its forward changes its own" in refused("BigBirdForMaskedLM", "BigBirdConfig", "masked", **settings)


@pytest.mark.parametrize(
    ("name", "config", "settings"),
    [
        ("MixtralForCausalLM", "MixtralConfig", {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}),
        ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**SIZES, **EXPERTS, "num_experts": 4, "head_dim": 8}),
        ("OlmoeForCausalLM", "OlmoeConfig", {**SIZES, "num_experts": 4, "num_experts_per_tok": 2}),
        ("Glm4MoeForCausalLM", "Glm4MoeConfig",
         {**SIZES, **EXPERTS, "n_routed_experts": 4, "first_k_dense_replace": 1, "head_dim": 8, "n_group": 1,
          "topk_group": 1}),
        ("DeepseekV3ForCausalLM", "DeepseekV3Config",
         {**SIZES, **EXPERTS, "num_key_value_heads": 4, "n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1,
          "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
          "v_head_dim": 8}),
        ("CohereForCausalLM", "CohereConfig", {**SIZES, "use_qk_norm": True}),
        ("Qwen2MoeForCausalLM", "Qwen2MoeConfig",
         {**SIZES, **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16, "use_sliding_window": False}),
        ("GptOssForCausalLM", "GptOssConfig",
         {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 8}),
    ],
)  # fmt: skip
def test_families_that_only_the_check_kept_from_the_packed_path(name, config, settings):
    """Experts, latent attention, norms a head, sinks: packed, and as the family's own forward computes by input_ids."""
    backbone, reason = checked_backbone(Backbone(build(name, config, **settings)))
    assert reason is None
    assert backbone.packs
    examples = make_examples("multi")
    ids = torch.tensor([5, 17, 40, 8])
    row = pack(examples)
    prompt = backbone.embed(ids)
    with torch.no_grad():
        found = backbone.score(row, backbone.inputs(row, prompt), prompt)[0]
    plain = build(name, config, **settings)
    plain.set_attn_implementation("eager")
    for example, scores in zip(examples, found, strict=True):
        for candidate, score in zip(example.candidate_ids, scores, strict=False):
            tokens = torch.tensor([[*ids.tolist(), *example.context_ids, *candidate]])
            with torch.no_grad():
                logs = log_softmax(plain(input_ids=tokens).logits[0, :-1].double(), -1)
            wanted = logs[-len(candidate) :].gather(-1, tokens[0, -len(candidate) :, None]).sum()
            assert relative_error(score.double(), wanted) < 1e-4


@pytest.mark.parametrize(
    ("name", "config", "settings"),
    [
        ("DiffLlamaForCausalLM", "DiffLlamaConfig", SIZES),
        ("OpenAIGPTLMHeadModel", "OpenAIGPTConfig",
         {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    ],
)  # fmt: skip
def test_families_whose_own_code_fails_on_a_packed_row(name, config, settings):
    """Not a crash: they run on the generic path, and the reason names what failed."""
    backbone, reason = checked_backbone(Backbone(build(name, config, **settings)))
    assert not backbone.packs
    assert "can't be served: its layers fail on the check's rows" in str(reason)


def test_inputs_that_are_scaled_in_place():
    """ctrl multiplies the embeddings that it is given, delta's leaf among them."""
    settings = {"vocab_size": 99, "n_embd": 32, "dff": 48, "n_layer": 2, "n_head": 4, "n_positions": 128}
    backbone = Backbone(build("CTRLLMHeadModel", "CTRLConfig", **settings))
    row = pack(make_examples("multi"))
    inputs = backbone.embed(row.token_ids).requires_grad_()
    prompt = backbone.embed(torch.tensor([5, 17, 40, 8]))
    before = inputs.detach().clone()
    backbone.score(row, inputs, prompt).logsumexp(-1).sum().backward()
    assert torch.equal(inputs.detach(), before)
    assert float(inputs.grad.norm()) > 0


def test_tokens_that_see_later_ones_have_no_scores():
    """xlnet attends in both directions unless it is told a permutation."""
    settings = {"vocab_size": 99, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}
    assert "its tokens see later ones" in refused("XLNetLMHeadModel", "XLNetConfig", "causal", **settings)


def test_layers_that_are_changed_in_place():
    """roc_bert writes into its layers' outputs, which a view wouldn't allow."""
    settings = {**SIZES, "enable_pronunciation": False, "enable_shape": False, "use_cache": False}
    check_backbone(Backbone(build("RoCBertForMaskedLM", "RoCBertConfig", **settings), head=Head("masked")))


def test_a_row_beyond_a_window_is_checked_where_the_runs_go_there(monkeypatch):
    """A window that attention never hears of shows on a long row alone."""
    model = build("MistralForCausalLM", "MistralConfig", **SIZES, sliding_window=32)
    check_backbone(Backbone(model), 100)
    from ptp_ds.attention import interface

    real = interface.attend_tree
    monkeypatch.setattr(interface, "attend_tree", lambda *args, window=None, **more: real(*args, **more))
    check_backbone(Backbone(build("MistralForCausalLM", "MistralConfig", **SIZES, sliding_window=32)), 20)
    with pytest.raises(ValueError, match="packed scores differ from plain ones"):
        check_backbone(Backbone(build("MistralForCausalLM", "MistralConfig", **SIZES, sliding_window=32)), 100)


def test_gradients_are_compared(monkeypatch):
    """Scores alone would pass: the prompt's gradient lacks what comes back through the rows' values."""
    from ptp_ds.attention import tree

    real = tree.MergedAttention.backward

    def short(ctx, grad):
        d_q, d_k, d_v, d_k_prefix, d_v_prefix, *rest = real(ctx, grad)
        return d_q, d_k, d_v, d_k_prefix, 0.5 * d_v_prefix, *rest

    monkeypatch.setattr(tree.MergedAttention, "backward", staticmethod(short))
    with pytest.raises(ValueError, match="its packed gradients differ from plain ones by"):
        check_backbone(Backbone(build("LlamaForCausalLM", "LlamaConfig", **SIZES)))


def settings_of(**settings):
    text = SimpleNamespace(**settings)
    text.get_text_config = lambda: text
    return text


def test_row_lengths_of_nested_rotary_settings_and_counted_tokens():
    nested = {"full_attention": {"rope_type": "longrope", "original_max_position_embeddings": 64},
              "sliding_attention": {"rope_type": "default"}}  # fmt: skip
    assert max_row_length(settings_of(max_position_embeddings=512, rope_parameters=nested)) == 64
    assert max_row_length(settings_of(max_position_embeddings=-1)) > 1 << 20  # xlnet's: no limit
    warm = settings_of(max_position_embeddings=1 << 17, attn_temperature_tuning=True, floor_scale=8192)
    assert max_row_length(warm) == most_counted_tokens(warm) == 8191
    windows = settings_of(sliding_window=8, attention_window=[4, 16])
    assert window_lengths(windows) == [4, 8, 16]
    assert [checked_length(windows, longest, 30) for longest in (3, 8, 9, 16, 17)] == [4, 8, 16, 16, 30]
    assert checked_length(windows, 9, 12) == 12


def test_sections_stay_below_what_a_layer_counts_itself():
    """llama4 scales its queries by their place in the section, from floor_scale on."""
    model = build("LlamaForCausalLM", "LlamaConfig", **SIZES)
    model.config.attn_temperature_tuning, model.config.floor_scale = True, 18
    backbone = Backbone(model, Activations("keep", chunk_tokens=1000))
    lengths = [chunk.length for chunk in backbone.plan(pack(make_examples("multi") * 4), (4,)).chunks]
    assert 11 < max(lengths) <= 17


def test_its_rows_are_no_longer_than_a_run_s_may_be(monkeypatch):
    """One token beyond and a nested longrope takes other angles: modernbert's masked rows end with a token more."""
    longrope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "factor": 8.0,
                "long_factor": [1.0, 2.0, 4.0, 6.0], "original_max_position_embeddings": 16}  # fmt: skip
    settings = {**SIZES, "cls_token_id": 0, "sep_token_id": 3, "num_hidden_layers": 3, "local_attention": 8,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
                "rope_parameters": {"full_attention": longrope,
                                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}}  # fmt: skip
    model = build("ModernBertForMaskedLM", "ModernBertConfig", **settings)
    limit, seen = max_row_length(model.config), []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    check_backbone(Backbone(model, head=Head("masked")))
    assert limit == 16
    assert max(seen) > 8


@pytest.mark.parametrize("bias", [False, True])
def test_a_vocabulary_in_parts_is_the_same_product_nearer_to_the_truth(bias):
    """Scores and gradients of a softmax over 49,152 words, of few rows: in parts at least as near to fp64 as in one."""
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(64, 49152, bias=bias)
    with torch.no_grad():
        for weight in head.parameters():
            weight.copy_(0.1 * torch.randn(weight.shape, generator=generator) + 0.05)
    rows = torch.randn(5, 64, generator=generator)

    def gradient(double=False):
        module, x = (head.double() if double else head.float()), (rows.double() if double else rows).requires_grad_()
        out = module(x)
        return out.detach(), torch.autograd.grad(log_softmax(out, -1)[:, 3].sum(), x)[0]

    whole, truth = gradient(), gradient(double=True)
    with InParts():
        parts = gradient()
    torch.testing.assert_close(parts[0], whole[0], atol=1e-5, rtol=1e-5)
    assert relative_error(parts[1].double(), truth[1]) <= 1.5 * relative_error(whole[1].double(), truth[1])
    assert relative_error(parts[1].double(), truth[1]) < 3e-5


def test_what_is_tried_at_the_start_is_not_counted_as_kept(monkeypatch):
    """Kernels are tried, with graphs of their own, before the pass that measures what a token costs."""
    bytes_per_token = []
    for tries in (False, True):
        backbone, tried = Backbone(make_model("llama"), Activations()), []

        def try_once(*_, tries=tries, tried=tried):
            if tries and not tried:
                tried.append(torch.randn(1 << 16, requires_grad=True).square().sum())

        monkeypatch.setattr(backbone_module, "try_flash", try_once)
        check_backbone(backbone)
        assert bool(tried) == tries
        bytes_per_token.append(backbone.activations.bytes_per_token)
    assert bytes_per_token[0] == bytes_per_token[1] > 0


def test_a_run_counts_gathers_from_behind_the_check(ranks):
    run = RunConfig(ds_config="ds_configs/zero3.json", precision="fp32")
    model = build_sharded(
        make_model("llama").config, resolve_ds_config(read_ds_config(run.ds_config), run, set(), 1, 32)
    )
    fill_randomly(model, 0.2)
    backbone = Backbone(model)
    check_backbone(backbone)
    assert backbone.shards.traffic == Traffic()
    with backbone.shards.outside_layers():
        backbone.embed(torch.tensor([1]))
    assert backbone.shards.traffic.gathered_bytes > 0
