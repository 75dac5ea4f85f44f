"""The environment that all hosts of a run share, what Open MPI says in variables of its own, and torch's allocator."""

import re
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from ptp_ds.errors import UserError
from ptp_ds.files import brief, read_text

_SHARED = (
    "CUDA_DEVICE_MAX_CONNECTIONS", "DS_ACCELERATOR", "GLOO_SOCKET_IFNAME", "HF_DATASETS_CACHE", "HF_DATASETS_OFFLINE",
    "HF_ENDPOINT", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "PTP_DS_CACHE",
    "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "TOKENIZERS_PARALLELISM", "TORCH_EXTENSIONS_DIR",
    "TRANSFORMERS_OFFLINE", "TRITON_CACHE_DIR", "TRITON_INTERPRET", "XDG_CACHE_HOME",
)  # fmt: skip
_SHARED_PREFIXES = ("NCCL_", "MALLOC_")
_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF")  # as torch reads them


def shared_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that all hosts get: a known list, then the user's .deepspeed_env; never tokens and keys.

    DeepSpeed hands them on between double quotes, in which a shell changes some values: these are refused. Raises
    UserError for them, and for a line of that file that is neither NAME=value nor a comment.
    """
    shared = {
        name: value
        for name, value in sorted(environment.items())
        if name in _SHARED or name.startswith(_SHARED_PREFIXES)
    }
    for file in _environment_files(environment):
        for number, line in enumerate(read_text(file, str(file)).splitlines(), start=1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            name, given, value = line.partition("=")
            if not given or not _NAME.fullmatch(name.strip()):
                raise UserError(
                    f"{file}, line {number}: {brief(name.strip())} isn't of the form NAME=value, with letters, digits "
                    "and _ in the name; mend it, or begin it with # as a comment."
                )
            shared[name.strip()] = value.strip()
    for name, value in shared.items():
        if re.search(r'["$`\\\n]', value):
            raise UserError(
                f"{name} holds one of \" $ ` \\ or a line break, which DeepSpeed can't hand to other hosts; set it "
                "there (in ~/.bashrc, say) and unset it here."
            )
    return shared


def _environment_files(environment: Mapping[str, str]) -> list[Path]:
    """DeepSpeed's: $DS_ENV_FILE or .deepspeed_env, in the home folder and in this one."""
    name = environment.get("DS_ENV_FILE", ".deepspeed_env")
    places = dict.fromkeys((Path.home() / name, Path.cwd() / name))
    return [file for file in places if file.is_file()]


def is_rank(environment: Mapping[str, str]) -> bool:
    """Whether a launcher or Open MPI's mpirun started this process as one of its ranks."""
    return "RANK" in environment or "OMPI_COMM_WORLD_RANK" in environment


def adopt_mpi(environment: MutableMapping[str, str]) -> None:
    """RANK and its like from Open MPI's variables, where mpirun started this process and nobody set them."""
    if "RANK" in environment or "OMPI_COMM_WORLD_RANK" not in environment:
        return
    names = {"RANK": "RANK", "WORLD_SIZE": "SIZE", "LOCAL_RANK": "LOCAL_RANK", "LOCAL_WORLD_SIZE": "LOCAL_SIZE"}
    for name, theirs in names.items():
        environment[name] = environment[f"OMPI_COMM_WORLD_{theirs}"]


def expand_segments(environment: MutableMapping[str, str]) -> None:
    """Lets torch's allocator on a GPU grow a segment in place of taking another; what a user has set, even "", stays.

    Rows differ in length from step to step, and what fitted one leaves gaps for the next. Heeded before the first
    tensor on a GPU alone.
    """
    if not any(name in environment for name in _ALLOCATOR):
        environment[_ALLOCATOR[-1]] = "expandable_segments:True"


def allocator_settings(environment: Mapping[str, str]) -> str:
    """What torch's allocator on a GPU is told; "" where nothing is."""
    return next((environment[name] for name in _ALLOCATOR if environment.get(name)), "")
