"""Process bootstrap for deepspeed, torchrun and plain python, free of DeepSpeed's traps on machines without a GPU."""

import ctypes
import os
import sys
import warnings
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch
from torch import Tensor

from ptp_ds.errors import UserError
from ptp_ds.hosts.environment import adopt_mpi, expand_segments
from ptp_ds.hosts.network import choose_interface
from ptp_ds.ranks.variables import OWN_VARIABLES

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's mallopt(3)


@dataclass(frozen=True)
class Ranks:
    """This process among all of the run."""

    rank: int
    world: int
    local_rank: int
    device: torch.device
    host_group: Any = None  # a gloo group beside nccl; None where the main group is gloo itself

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor summed over ranks, in place; every rank must call it."""
        if self.world > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def max(self, tensor: Tensor) -> Tensor:
        """The tensor's maximum over ranks, in place; every rank must call it."""
        if self.world > 1:
            torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX)
        return tensor

    def host_max(self, value: int) -> int:
        """The largest of the ranks' whole numbers, over host memory: no device is waited for."""
        if self.world == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.int64)
        torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX, group=self.host_group)
        return int(tensor)

    def send_main(self, tensor: Tensor) -> None:
        """Hands a tensor in host memory to rank 0, which must ask for it (received)."""
        torch.distributed.send(tensor.contiguous(), 0, group=self.host_group)

    def received(self, rank: int, out: Tensor) -> Tensor:
        """`out`, in host memory, filled with what `rank` hands to rank 0 (send_main)."""
        torch.distributed.recv(out, rank, group=self.host_group)
        return out

    def from_main(self, value: int) -> int:
        """Rank 0's whole number, on every rank."""
        if self.world == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.int64, device=self.device)
        torch.distributed.broadcast(tensor, 0)
        return int(tensor)

    def barrier(self) -> None:
        """Waits until every rank is here."""
        if self.world > 1:
            torch.distributed.barrier()


def env_rank() -> int:
    """This process' rank before anything is initialised (0 for plain python)."""
    return int(os.environ.get("RANK", "0"))


def env_world() -> int:
    """The number of processes before anything is initialised."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def env_host_ranks() -> int:
    """The number of this host's processes before anything is initialised; all where no launcher says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or env_world())


def prepare_environment() -> None:
    """Settings that must stand before DeepSpeed is imported; called first of all. Keeps what a user has set."""
    adopt_mpi(OWN_VARIABLES)
    if not torch.cuda.is_available():
        OWN_VARIABLES.setdefault("DS_ACCELERATOR", "cpu")
        _keep_freed_memory()
        # torch takes huge pages for large tensors: 5 % of a step's time.
        OWN_VARIABLES.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    elif not torch.cuda.is_initialized():  # a program that has used its GPU has chosen its allocator
        expand_segments(OWN_VARIABLES)
    OWN_VARIABLES.setdefault("TOKENIZERS_PARALLELISM", "false")
    OWN_VARIABLES.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    OWN_VARIABLES.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # DeepSpeed's import would, and leave it


def _keep_freed_memory() -> None:
    """On a CPU: glibc gives freed memory back and faults it in again at every step, up to a tenth of the time."""
    if sys.platform == "linux" and not any(name.startswith("MALLOC_") for name in os.environ):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # absent from other C libraries
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, 1 << 30)
            mallopt(_M_TRIM_THRESHOLD, -1)  # never


_ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
_set_by_us: dict[str, str] = {}  # variables of _ALONE, until stop_processes


def is_launched() -> bool:
    """Whether a launcher's or the calling program's process group is what a run takes part in, and leaves as it is."""
    return "RANK" in os.environ or (torch.distributed.is_available() and torch.distributed.is_initialized())


def _stand_alone(backend: str, timeout: timedelta) -> None:
    """What a launcher would set, for plain python; the group of one meets in memory, on no port."""
    if not is_launched():
        ours = {name: value for name, value in _ALONE.items() if name not in os.environ}
        _set_by_us.update(ours)
        os.environ.update(ours)
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)


def _require_gpu(local_rank: int) -> None:
    """UserError where this host's ranks outnumber its GPUs. DeepSpeed's launcher says how many they are (LOCAL_SIZE),
    so that they all know; any other's rank beyond the last GPU knows of itself.
    """
    found, needed = torch.cuda.device_count(), max(local_rank + 1, int(os.environ.get("LOCAL_SIZE", "1")))
    if needed > found:
        raise UserError(f"This host shows {found} GPU(s) to {needed} ranks; start a rank a GPU: --num_gpus {found}, or "
                        f"slots={found} in the hostfile (torchrun: --nproc_per_node {found}).")  # fmt: skip


def start_processes() -> Ranks:
    """Joins the process group through DeepSpeed and returns this rank's place and device.

    Raises ValueError where there is no GPU for this rank, or where the network interface that leads to the other hosts
    can't be told.
    """
    prepare_environment()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        _require_gpu(local_rank)
    choose_interface(OWN_VARIABLES)
    import deepspeed
    import deepspeed.ops

    deepspeed.utils.logger.setLevel("WARNING")
    # DeepSpeed 0.19.8 calls collectives by names that torch 2.13 renames, at every step.
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        # init_distributed would compile this op for two minutes, and training doesn't use it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if "OMP_NUM_THREADS" not in os.environ:
            here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or env_world())
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // max(1, here)))
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(minutes=30)
    _stand_alone(backend, timeout)
    deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=timeout)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    host_group = torch.distributed.new_group(backend="gloo") if backend == "nccl" and world > 1 else None
    return Ranks(rank, world, local_rank, device, host_group)


def stop_processes() -> None:
    """Leaves the process group and takes back what a run has changed in this process: the next one starts as in a fresh
    process. Safe to call again.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        comm = sys.modules.get("deepspeed.comm")
        if comm is not None and comm.is_initialized():
            comm.destroy_process_group()  # forgets DeepSpeed's own groups, too
        else:
            torch.distributed.destroy_process_group()
    while _set_by_us:
        name, value = _set_by_us.popitem()
        if os.environ.get(name) == value:  # else the program has set it since
            os.environ.pop(name, None)
    _restore_linear()


def _restore_linear() -> None:
    """DeepSpeed's zero.Init leaves a linear of its own in torch's place for the process' life (0.19.8)."""
    zero = sys.modules.get("deepspeed.runtime.zero.partition_parameters")
    if zero is not None and torch.nn.functional.linear is zero.zero3_linear_wrap:
        torch.nn.functional.linear = zero.InsertPostInitMethodToModuleSubClasses.linear_bk


def exit_process(code: int) -> NoReturn:
    """Ends the process without the interpreter's own teardown, once all is written and closed.

    There a rank now and then aborts behind a run that was complete (SIGABRT, "terminate called without an active
    exception", no Python frame left: 2 of about 60 on busy cores), and the launcher would report a failed run.
    """
    with suppress(OSError):  # whoever read them may be gone
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
