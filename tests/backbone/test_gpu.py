"""On a CUDA GPU: packed scores and gradients against plain ones in fp32, bf16 within its rounding."""

import pytest
import torch

from ptp_ds.attention.flash import flash_serves, largest_error, try_flash
from ptp_ds.attention.plan import plan_tree
from ptp_ds.attention.tree import attend_reference
from ptp_ds.backbone.adjacent import lay_together
from ptp_ds.backbone.backbone import Backbone
from ptp_ds.backbone.check import check_backbone
from ptp_ds.backbone.frozen_linear import torchs
from ptp_ds.backbone.joint_products import Siblings
from ptp_ds.packing.row import Block, pack
from tests.support.reference import FAMILIES, make_examples, make_model, plain_scores, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here"),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("dtype", "score_bound", "gradient_bound"), [(torch.float32, 1e-4, 1e-3), (torch.bfloat16, 0.3, 0.1)]
)
def test_packed_on_the_gpu_equals_plain_on_the_cpu(family, dtype, score_bound, gradient_bound):
    examples = make_examples("multi")
    prompt = (0.3 * torch.randn(5, 32, generator=torch.Generator().manual_seed(1))).requires_grad_()
    model = make_model(family)
    expected = [plain_scores(model, prompt, example) for example in examples]
    (plain_gradient,) = torch.autograd.grad(sum(scores.log_softmax(-1)[-1] for scores in expected), prompt)
    backbone = Backbone(model.to("cuda", dtype))
    check_backbone(backbone)
    row = pack(examples).to("cuda")
    scores = backbone.score(row, backbone.embed(row.token_ids), prompt.cuda())[0]
    (gradient,) = torch.autograd.grad(sum(row_scores.log_softmax(-1)[-1] for row_scores in scores), prompt)
    for ours, theirs in zip(scores, expected, strict=True):
        assert float((ours.cpu() - theirs).abs().max()) < score_bound
    assert relative_error(gradient, plain_gradient) < gradient_bound


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_joint_products_on_the_gpu(family, dtype, bound):
    """On by default, with the scores and the prompt's gradient of products that each layer computes alone."""
    found = []
    for wanted in (False, None):
        backbone = Backbone(make_model(family).to("cuda", dtype), joint=wanted)
        check_backbone(backbone)
        assert backbone.joined.startswith("each alone" if wanted is False else "one for q_proj+k_proj+v_proj")
        row = pack(make_examples("multi")).to("cuda")
        prompt = (0.3 * torch.randn(5, 32, generator=torch.Generator().manual_seed(1))).cuda().requires_grad_()
        scores = backbone.score(row, backbone.embed(row.token_ids), prompt)[0]
        present = scores[scores.isfinite()]
        found.append((present.detach(), torch.autograd.grad(present.cos().sum(), prompt)[0]))
    for together, alone in zip(found[1], found[0], strict=True):
        assert relative_error(together, alone) < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [(1024, 1024), (1024, 256, 256)])
def test_a_joint_product_takes_no_memory_but_its_outputs(sizes, dtype):
    """Neither input nor weight is copied, and values are those of single products."""
    layers = [
        torch.nn.Linear(512, size, bias=False, device="cuda", dtype=dtype).requires_grad_(False) for size in sizes
    ]
    assert lay_together([layer.weight for layer in layers])
    x = torch.randn(1, 4096, 512, device="cuda", dtype=dtype)
    wanted = [layer(x) for layer in layers]
    Siblings(layers, torchs)
    layers[0](x[:, :7] * 1), torch.cuda.synchronize()  # the library's own workspace
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = [layer(x) for layer in layers]
    assert torch.cuda.max_memory_allocated() - before <= 1.05 * sum(out.nbytes for out in found)
    for out, own in zip(found, wanted, strict=True):
        assert relative_error(out.float(), own.float()) < (1e-5 if dtype == torch.float32 else 1e-2)


def test_a_run_on_the_gpu(run_train, tiny_model, tmp_path):
    args = [
        "--model",
        tiny_model,
        "--task",
        "COPA",
        "--max_steps",
        "3",
        "--perturbation",
        "pgd",
        "--prompt_length",
        "5",
    ]
    done = run_train([*args, "--output_dir", tmp_path / "run"])
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "run" / "result.json").is_file()
    assert "GPU allocator: expandable_segments:True" in done.stdout + done.stderr


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_flash_kernels_agree_with_the_reference(dtype):
    """The kernels that training takes here, forward and backward, on a tree of branches; see the start-up trial."""
    device = torch.device("cuda", torch.cuda.current_device())
    assert largest_error(device, dtype, attend_reference) < 2e-2
    try_flash(device, dtype, attend_reference)
    q = torch.zeros(5, 4, 64, dtype=dtype, device=device)
    assert flash_serves(plan_tree([Block(5, (0, 3), (-1, 0))], 0, 3, device), q, q)
