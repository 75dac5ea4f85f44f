"""Known lines of libraries are left out, each by its text; anything else is heard."""

import subprocess
import sys

from tests.support.encoders import ENCODERS
from tests.support.processes import worker_environment
from tests.support.runs import QUICK, check

HARMLESS = [
    "Token indices sequence length is longer than the specified maximum sequence length for this model (606 > 512).",
    "BloomForCausalLM does not support setting its attention implementation dynamically, because ...",
    "BertForSequenceClassification LOAD REPORT from: x\nclassifier.weight | MISSING |",
]
NEW = ["Some other warning", "Bert LOAD REPORT from: x\nlayer.0.weight | MISMATCH |"]


def test_transformers_lines():
    code = (
        "import sys\nimport transformers\nfrom ptp_ds.ranks.quiet import quiet_libraries\nquiet_libraries()\n"
        "quiet_libraries()\nlog = transformers.utils.logging.get_logger('transformers.modeling_utils')\n"
        "for message in sys.argv[1:]:\n    log.warning(message)\n    print('END', file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *HARMLESS, *NEW], env=worker_environment(), capture_output=True,
                          text=True, timeout=100, check=True)  # fmt: skip
    assert done.stdout == ""
    *heard, rest = done.stderr.split("END\n")
    assert rest == ""
    assert heard[: len(HARMLESS)] == [""] * len(HARMLESS)
    for message, lines in zip(NEW, heard[len(HARMLESS) :], strict=True):
        assert message in lines


def test_a_classifier_on_a_bare_encoder_starts_in_silence(run_train, tiny_model, tokenizer, tmp_path):
    """transformers reports the classifier's absent tensors, and draws a bar for tensors that are read."""
    from transformers import AutoConfig, AutoModelForMaskedLM

    sizes = {**ENCODERS["bert"], "vocab_size": len(tokenizer), "max_position_embeddings": 512}
    config = AutoConfig.for_model("bert", **sizes)
    folder = tmp_path / "bert"
    AutoModelForMaskedLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    done = check(run_train([*QUICK, "--task", "CB", "--model", folder, "--head", "classes", "--max_steps", "1",
                            "--ds_config", "ds_configs/zero2.json", "--output_dir", tmp_path / "run"]))  # fmt: skip
    assert done.stderr == ""
