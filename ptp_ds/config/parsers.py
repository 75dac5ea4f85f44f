"""The command lines of everything that isn't train: what each command takes, without what it needs to run.

A parser is made from text alone, so that --help answers at once; a command's module reads the values and does the rest.
"""

import argparse
from collections.abc import Callable

from ptp_ds.choices import PRECISIONS
from ptp_ds.config.flags import StrictParser, build_parser
from ptp_ds.config.run_config import RunConfig

SPACES = ("input", "prompt")  # of a landscape
LEVELS: dict[str, tuple[list[float], str]] = {
    "noise": ([0.0, 0.5, 1.0, 2.0, 4.0], "sigma of normal noise on embeddings, in mean embedding norms"),
    "masks": ([0.0, 0.1, 0.2, 0.4], "share of words that are hidden"),
    "typos": ([0.0, 0.1, 0.2, 0.4], "share of words that are misspelt: two letters swapped or one dropped"),
    "attack": ([0.0, 0.1, 0.2], "share of words that A2T may swap, at least four"),
}
# flag -> (default, unit, help); rates are what is reached, not what is printed on the box
CLUSTER: dict[str, tuple[float | None, str, str]] = {
    "hosts": (None, "", "hosts"), "gpus": (None, "", "GPUs of a host, a rank each"),
    "gpu_memory": (None, "GiB", "memory of a GPU"),
    "usable": (0.9, "", "share of it that tensors may fill; the rest is the CUDA context's and fragmentation's"),
    "interconnect": (50.0, "GB/s", "into a host from the others"),
    "local_interconnect": (200.0, "GB/s", "into a GPU from its own host's"),
    "tflops": (400.0, "TFLOP/s", "of a GPU's matrix products, reached"),
    "memory_bandwidth": (2500.0, "GB/s", "of a GPU's memory"),
    "host_link": (25.0, "GB/s", "from a host's memory to a GPU"), "disk": (5.0, "GB/s", "read by a host's NVMe disk"),
}  # fmt: skip
_DEFAULTS = RunConfig()


def _add_scoring(parser: StrictParser) -> None:
    """Flags of every command that scores rows with an adapter."""
    parser.add_argument("--precision", default="auto", choices=PRECISIONS)
    parser.add_argument("--max_length", type=int, metavar="N", help="longest row in tokens, prompt included; default: "
                        "the run's")  # fmt: skip
    parser.add_argument("--eval_tokens", type=int, metavar="N", default=_DEFAULTS.eval_tokens,
                        help="tokens of a pass on each rank (default: %(default)s)")  # fmt: skip


def _add_served(parser: StrictParser) -> None:
    parser.add_argument("--model", help="where the model of the adapter's run lies: hub id, folder or the embedded "
                        "model; default: where the adapter says")  # fmt: skip
    parser.add_argument("--task", help="task name or template .json; default: the one the adapter was trained on")


def evaluate_parser(description: str = "") -> StrictParser:
    """scripts/evaluate.py."""
    parser = StrictParser(description=description, allow_abbrev=False)
    parser.add_argument("--adapter", required=True, nargs="+", help="a run's folder, an adapter's, ours or peft's, or "
                        "a hub id; several of one task are an ensemble: the mean of their probabilities")  # fmt: skip
    _add_served(parser)
    parser.add_argument("--data_dir", help="folder with <Task>/<split>.jsonl, .csv or .tsv; default: the data that the "
                        "adapter was trained on")  # fmt: skip
    parser.add_argument("--dataset", help="hub dataset id or folder, instead of --data_dir")
    parser.add_argument("--split", help=f"default: the one that the run reported, else {_DEFAULTS.eval_split}")
    parser.add_argument("--ds_config", default=_DEFAULTS.ds_config, help="as for train; what it says of batches and "
                        "gradients is left out (default: %(default)s)")  # fmt: skip
    parser.add_argument("--nvme_path", metavar="NAME", help="as for train")
    _add_scoring(parser)
    parser.add_argument("--json", metavar="FILE", help="write metrics and every row's candidate log-probabilities")
    parser.add_argument("--predictions", metavar="FILE", help="write SuperGLUE's prediction file; the split may have "
                        "no labels")  # fmt: skip
    parser.add_argument("--lm_eval_tasks", metavar="DIR", help="also write the task and these rows for lm-evaluation-"
                        "harness here, which then scores the adapter alike")  # fmt: skip
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser


def push_parser(description: str = "") -> StrictParser:
    """scripts/push.py."""
    parser = StrictParser(description=description, allow_abbrev=False)
    parser.add_argument("repo_id", metavar="OWNER/NAME", help="the hub repository, made where there is none")
    parser.add_argument("--adapter", required=True, help="a run's folder, or an adapter's, ours or peft's")
    parser.add_argument("--private", action="store_true", help="a new repository is private; one that exists stays as "
                        "it is")  # fmt: skip
    parser.add_argument("--base_model", help="hub id of the model, where the adapter was trained on a folder")
    return parser


def predict_parser(description: str = "") -> StrictParser:
    """scripts/predict.py."""
    parser = StrictParser(description=description, allow_abbrev=False)
    parser.add_argument("--adapter", required=True, help="a run's folder, an adapter's, ours or peft's, or a hub id")
    _add_served(parser)
    parser.add_argument("--input", metavar="FILE", help="rows with the fields that the task's template needs, no "
                        "labels: .csv or .tsv with a header, else JSON lines; - for JSON lines on standard "
                        "input")  # fmt: skip
    parser.add_argument("--output", metavar="FILE", help="write a JSON object a context here; default: standard output")
    parser.add_argument("--text", nargs="+", metavar="FIELD=VALUE", help="one row instead of --input; the text alone "
                        "where the template has a single field", instead="give one row's fields behind one --text, and "
                        "several rows in a file behind --input")  # fmt: skip
    parser.add_argument(
        "--generate", type=int, metavar="N", help="also generate N tokens behind each context, greedily"
    )
    _add_scoring(parser)
    return parser


def overall_parser(description: str = "") -> StrictParser:
    """scripts/overall.py."""
    parser = StrictParser(description=description, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="folders with result.json, in any order")
    parser.add_argument("--json", metavar="FILE", help="write the tables to this file as well")
    return parser


def draw_parser(description: str = "") -> StrictParser:
    """scripts/draw.py."""
    parser = StrictParser(description=description, allow_abbrev=False)
    parser.add_argument("file", help="labelled rows: JSON lines, or .csv or .tsv with a header")
    parser.add_argument("--task", required=True, help="task name or template .json: what a row says, and its label")
    parser.add_argument("--data_dir", required=True, help="few<K>-<draw>.jsonl, dev<K>-<draw>.jsonl and test<N>.jsonl "
                        "go into its folder of the task's name, where train's --data_dir finds them")  # fmt: skip
    parser.add_argument("--rows", type=int, metavar="K", default=16, help="rows of each label to train on, and as many "
                        "others to select on (default: 16)")  # fmt: skip
    parser.add_argument("--draws", nargs="+", metavar="NAME", default=["13", "21", "42", "87", "100"],
                        help="names of the draws, which decide what each takes (default: 13 21 42 87 100)")  # fmt: skip
    parser.add_argument("--test", type=int, metavar="N", default=0, help="also N test rows that no draw holds "
                        "(default: 0, for rows whose test split is a file of its own)")  # fmt: skip
    return parser


def study_parser(description: str = "") -> StrictParser:
    """scripts/study.py."""
    parser = StrictParser(description=description, allow_abbrev=False)
    parser.add_argument("study", help="JSON or YAML file: settings, seeds, tasks, methods")
    parser.add_argument("--output_dir", required=True, help="cells/<task>/<method>, rows.jsonl, rows.csv, report.md "
                        "and pictures go here; what is finished there is not run again")  # fmt: skip
    parser.add_argument("--methods", nargs="+", help="only these of the study's methods")
    parser.add_argument("--tasks", nargs="+", help="only these of the study's tasks")
    parser.add_argument("--report", action="store_true", help="train nothing; tables and pictures of what is finished")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser


def _adapters_parser(description: str, rows: int, seed: str) -> StrictParser:
    """The flags of a script that looks at several adapters' prompts on the same rows. rows: how many by default; seed:
    what --seed is for.
    """
    parser = StrictParser(description=description, allow_abbrev=False)
    parser.add_argument(
        "--adapters", required=True, nargs="+", help="runs' folders, or adapters', of one model and task"
    )
    parser.add_argument("--rows", type=int, metavar="N", default=rows, help=f"rows of the split, at most (default: "
                        f"{rows})")  # fmt: skip
    parser.add_argument("--split", help="default: the one that the first adapter's run reported; AdvGLUE's rows are a "
                        "split as any other")  # fmt: skip
    parser.add_argument("--data_dir", help="default: the data that the first adapter was trained on")
    parser.add_argument("--dataset", help="hub dataset id or folder, instead of --data_dir")
    parser.add_argument("--model", help="default: where the first adapter says")
    parser.add_argument("--seed", type=int, metavar="N", default=0, help=f"of {seed} (default: 0)")
    parser.add_argument("--precision", default="auto", choices=PRECISIONS)
    parser.add_argument("--eval_tokens", type=int, metavar="N", default=_DEFAULTS.eval_tokens, help="tokens of a pass")
    return parser


def landscape_parser(description: str = "") -> StrictParser:
    """scripts/landscape.py."""
    parser = _adapters_parser(description, 16, "the random directions")
    parser.add_argument("--output_dir", required=True, help="landscape-<space>.png, landscape.npz, landscape.json and "
                        "tensorboard/ go here")  # fmt: skip
    parser.add_argument("--spaces", nargs="+", default=list(SPACES), choices=SPACES,
                        help="a delta on the rows' embeddings, or the prompt itself (default: both)")  # fmt: skip
    parser.add_argument("--grid", type=int, metavar="N", default=41, help="points of an axis, odd (default: 41)")
    parser.add_argument("--tolerance", type=float, metavar="X", default=0.01, help="values are interpolated from fewer "
                        "points where that is this near, a share of their range, at points it had not seen; 0: all are "
                        "computed (default: 0.01)")  # fmt: skip
    parser.add_argument("--radius", type=float, metavar="X", default=1.0, help="input: half an axis, in mean embedding "
                        "norms, of a whole row as in pgd's epsilon (default: 1)")  # fmt: skip
    parser.add_argument("--prompt_radius", type=float, metavar="X", default=1.0, help="prompt: half an axis, in norms "
                        "of the prompt's own tokens (default: 1)")  # fmt: skip
    parser.add_argument("--radii", type=float, metavar="X", nargs="+", help="radii whose rises are told (default: a "
                        "tenth, a quarter, half and all of the axis)")  # fmt: skip
    return parser


def robustness_parser(description: str = "") -> StrictParser:
    """scripts/robustness.py."""
    parser = _adapters_parser(description, 200, "noise, masks and typos")
    parser.add_argument("--output_dir", required=True, help="robustness.json and robustness.png go here")
    parser.add_argument("--kinds", nargs="+", default=list(LEVELS), choices=list(LEVELS))
    for kind, (levels, text) in LEVELS.items():
        parser.add_argument(f"--{kind}", type=float, metavar="X", nargs="+", default=levels,
                            help=f"{text} (default: {' '.join(f'{level:g}' for level in levels)})")  # fmt: skip
    parser.add_argument("--draws", type=int, metavar="N", default=3, help="of each level but the attack's (default: 3)")
    return parser


def plan_parser(description: str = "") -> StrictParser:
    """scripts/plan.py's own flags; those of scripts/train.py are read behind them."""
    parser = StrictParser(
        description=description, allow_abbrev=False, epilog="All flags of scripts/train.py are read as well."
    )
    for name, (default, unit, text) in CLUSTER.items():
        shown = f"{text}{f', {unit}' if unit else ''}" + ("" if default is None else f" (default: {default:g})")
        kind = int if name in ("hosts", "gpus") else float
        parser.add_argument(f"--{name}", type=kind, default=default, required=default is None, help=shown, metavar="N")
    parser.add_argument("--members", type=int, metavar="N", default=1, help="prompts that train at once, as the flags "
                        "say; or --seeds or --population as for scripts/train.py (default: 1)")  # fmt: skip
    parser.add_argument("--json", metavar="FILE", help="write the plans to this file")
    return parser


def doctor_parser(description: str = "") -> argparse.ArgumentParser:
    """scripts/doctor.py; flags that choose hosts are DeepSpeed's. Its exit code 2 is argparse's own."""
    parser = argparse.ArgumentParser(description=description or "Checks every host of a hostfile before a run.")
    parser.add_argument("-H", "--hostfile", required=True, help="a hostfile's path, or the name of a packaged "
                        "one, as for ptp launch")  # fmt: skip
    parser.add_argument("-i", "--include", default="", help="as for the deepspeed command")
    parser.add_argument("-e", "--exclude", default="", help="as for the deepspeed command")
    parser.add_argument("--num_nodes", type=int, metavar="N", default=-1, help="as for the deepspeed command")
    parser.add_argument("--num_gpus", type=int, metavar="N", default=-1, help="as for the deepspeed command")
    parser.add_argument("--ssh_port", type=int, metavar="N", help="as for the deepspeed command")
    parser.add_argument("--model", help="the run's --model: its files must be the same on every host")
    parser.add_argument("--output_dir", help="the run's --output_dir: must be writable, with room")
    parser.add_argument("--min_free_gb", type=float, metavar="X", default=1.0, help="free space in the output folder, "
                        "GB (default: 1)")  # fmt: skip
    parser.add_argument("--min_memory_gb", type=float, metavar="X", default=4.0, help="free host memory, GB "
                        "(default: 4)")  # fmt: skip
    parser.add_argument("--max_skew", type=float, metavar="X", default=2.0, help="seconds between a host's clock and "
                        "this one's (default: 2)")  # fmt: skip
    parser.add_argument("--full_hash", action="store_true", help="read large weight files whole, not 64 MiB of each")
    parser.add_argument("--mebibytes", type=int, metavar="N", default=64, help="size of the timed collectives, MiB "
                        "(default: 64)")  # fmt: skip
    parser.add_argument("--no_collectives", action="store_true", help="ask the hosts alone, start no ranks")
    return parser


PARSERS: dict[str, Callable[[str], argparse.ArgumentParser]] = {
    "train": build_parser, "evaluate": evaluate_parser, "predict": predict_parser, "overall": overall_parser,
    "study": study_parser, "landscape": landscape_parser, "robustness": robustness_parser, "plan": plan_parser,
    "doctor": doctor_parser, "push": push_parser, "draw": draw_parser,
}  # fmt: skip
