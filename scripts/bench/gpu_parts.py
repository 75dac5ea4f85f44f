"""The parts of scripts/gpu_check.sh, in the order of their worth: what each asks, how it is started, what is shown."""

from collections.abc import Sequence
from dataclasses import dataclass

_STEP = ("step_seconds", "tokens_per_second", "mfu", "rate_share", "peak_bytes", "reserved_bytes", "peak_over_plan",
         "peft_rows", "peft_seconds", "peft_mfu", "ratio_peft_keep", "seconds")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Part:
    """One question and the script of this folder that answers it.

    arguments: on a GPU; dry: those of a dry run, whose sizes alone differ. {out}: the check's folder; {model}: the
    model that is trained. json: the script's flag for its file of rows. usual: seconds that it takes on one H100, a
    guess until one has run it; a part isn't started with less than half of them left. columns: what the table shows.
    """

    name: str
    asks: str
    script: str
    arguments: Sequence[str] = ()
    dry: Sequence[str] = ("--dry",)
    usual: int = 60
    columns: Sequence[str] = ()

    def command(self, python: str, folder: str, out: str, model: str, dry: bool) -> list[str]:
        """What is run."""
        words = [word.format(out=out, model=model) for word in (self.dry if dry else self.arguments)]
        return [python, f"{folder}/{self.script}", *words, "--json", f"{out}/{self.name}.json"]


_TINY_STEP = ("--shape", "tiny", "--rows", "4", "--peft_rows", "2", "--prompt_length", "3", "--steps", "1")

PARTS = (
    Part(
        name="step_8b", asks="a step of an 8B-shaped model on 32k packed tokens, beside peft's on the same batch",
        script="bench_large.py", arguments=("--shape", "8b", "--rows", "160", "--peft_rows", "16", "--steps", "2"),
        dry=_TINY_STEP, usual=240, columns=_STEP,
    ),
    Part(
        name="step_small", asks="the same for SmolLM2-135M's shape, 160 and 16 rows' worth of work",
        script="bench_large.py",
        arguments=("--shape", "smollm2", "--rows", "160", "16", "--peft_rows", "16", "--steps", "5"),
        dry=(*_TINY_STEP[:3], "4", "2", *_TINY_STEP[4:]), usual=60, columns=_STEP,
    ),
    Part(name="syncs", asks="which operations of a step wait for the device", script="gpu_syncs.py", usual=60,
         columns=("syncs", "by_operation", "by_place")),
    Part(name="profile", asks="a step's time by kinds of kernels, and the gaps between launches",
         script="gpu_profile.py", usual=70,
         columns=("step_seconds", "busy_seconds", "gap_share", "product", "attention", "elementwise", "copies",
                  "communication", "kernels")),
    Part(name="train", asks="training in fp32, bf16 and fp16: losses, scores, memory", script="gpu_train.py",
         arguments=("--model", "{model}", "--folder", "{out}/train"),
         dry=("--dry", "--model", "{model}", "--folder", "{out}/train"), usual=80,
         columns=("first_loss", "last_loss", "metrics", "tokens_per_second", "step_seconds", "peak_bytes")),
    Part(name="equal", asks="two runs, and a resumed one: the same to the bit?", script="gpu_equal.py",
         arguments=("--model", "{model}", "--folder", "{out}/equal"),
         dry=("--dry", "--model", "{model}", "--folder", "{out}/equal"), usual=90,
         columns=("equal", "largest_difference")),
    Part(name="sweep", asks="chunk_tokens, keep and recompute, zero2 and zero3, schedule, joint products, Liger's",
         script="gpu_sweep.py", usual=150,
         columns=("step_seconds", "tokens_per_second", "rate_share", "peak_bytes", "reserved_bytes",
                  "peak_over_plan")),
    Part(name="tests", asks="the tests marked gpu", script="gpu_tests.py", arguments=("gpu",), dry=("gpu", "--dry"),
         usual=90, columns=("passed", "failed", "skipped")),
    Part(name="flash", asks="flash parts against the reference: several runs, d to 256, non-causal, gradients",
         script="gpu_flash.py", usual=60, columns=("difference", "bound", "flash_ms", "reference_ms",
                                                           "reference_over_flash")),
    Part(name="evaluate", asks="rows a second of an evaluation; answers of several tokens at 128k words",
         script="gpu_evaluate.py", usual=60,
         columns=("rows_per_second", "tokens_per_second", "step_seconds", "peak_bytes", "reserved_bytes")),
    Part(name="encoder", asks="an encoder in bf16 against itself in fp32", script="gpu_encoder.py", usual=45,
         columns=("step_seconds", "tokens_per_second", "peak_bytes", "score_difference", "gradient_difference",
                  "speedup")),
    Part(name="ranks", asks="offload; with more GPUs two ranks against one, hpZ, int8 gathers", script="gpu_ranks.py",
         arguments=("--folder", "{out}/ranks"), dry=("--dry", "--folder", "{out}/ranks"), usual=150,
         columns=("world_size", "step_seconds", "gathered_gb_per_second", "peak_bytes", "difference", "bound")),
    Part(name="attention", asks="attention over the tree against the reference and FlexAttention",
         script="bench_attention.py", dry=("--repeats", "1", "--examples", "4"), usual=60,
         columns=("tokens", "branches", "ours", "reference", "flex")),
    Part(name="kernels", asks="fused kernels against eager and compiled torch, and copies", script="bench_kernels.py",
         dry=("--repeats", "2", "--examples", "4", "--width", "64", "--vocabulary", "512"), usual=120,
         columns=("kernel", "triton_ms", "eager_ms", "bandwidth_share", "eager_over_triton", "compiled_over_triton")),
    Part(name="bench", asks="the step on real rows, in fp32 and bf16, beside both of peft's loops",
         script="bench_step.py",
         arguments=("--model", "{model}", "--rows", "16", "64", "--pairs", "3", "--activations"),
         dry=("--model", "{model}", "--rows", "2", "--pairs", "1", "--activations", "--data_dir", "", "--tasks",
              "Reviews", "--prompt_lengths", "3", "--methods", "gaussian"), usual=150,
         columns=("task", "rows", "prompt_length", "method", "dtype", "ours_seconds", "ratio_peft", "ratio_peft_keep",
                  "floor_share", "activations", "peak_ratio", "time_ratio")),
    Part(name="precision", asks="bf16 and fp16 against fp32 over seeds", script="compare_precision.py",
         arguments=("--precisions", "fp32", "bf16", "fp16", "--steps", "60"),
         dry=("--precisions", "fp32", "--steps", "2", "--seeds", "0", "1", "--model", "{model}"), usual=240,
         columns=("precision", "scores")),
    Part(name="kernel_tests", asks="the kernels' tests, compiled", script="gpu_tests.py", arguments=("kernels",),
         dry=("kernels", "--dry"), usual=300, columns=("passed", "failed", "skipped")),
)  # fmt: skip
BY_NAME = {part.name: part for part in PARTS}
