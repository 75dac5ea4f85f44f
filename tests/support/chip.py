"""A device that isn't there: its tensors hold host tensors, and a mode sees and counts all that is asked of it.

What would stop a host's queue of work on a GPU is told from what wouldn't, with real numbers, so that any code runs.
Installing it takes torch's place for a third party's device in this process for good: for worker processes only.
"""

import traceback
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from tests.support.paths import ROOT
from tests.support.played_flash import played_kernel

WAITS = {  # the host reads a value, or a shape that a value decides
    "_local_scalar_dense", "nonzero", "nonzero_static", "masked_select", "is_nonzero", "equal", "_unique", "_unique2",
    "unique_dim", "unique_consecutive", "unique_dim_consecutive", "bincount", "_assert_async", "allclose",
}  # fmt: skip
_NO_KERNELS = {"detach", "_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "promote_types"}
_library: list[Any] = []


class _Module(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:  # a checkpoint's backward asks
        return [torch.bfloat16]


class Chip(Tensor):
    """host: the tensor that holds its numbers."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> "Chip":
        made = Tensor._make_wrapper_subclass(
            cls, host.size(), strides=host.stride(), storage_offset=host.storage_offset(), dtype=host.dtype,
            device=torch.device("chip", 0),
        )  # fmt: skip
        made.host = host
        return made

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def tolist(self) -> Any:
        _count("wait", "tolist")
        return self.host.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _compute(func, args, kwargs or {})


def install() -> torch.device:
    """Makes the device "chip" known to torch and returns it."""
    _setup_privateuseone_for_python_backend("chip", backend_module=_Module())
    library = torch.library.Library("aten", "IMPL")  # what torch calls beneath every mode: torch.tensor(list, device)
    library.impl("empty_strided", lambda size, stride, **_: _unseen(size, stride, **_), "PrivateUse1")
    library.impl(
        "empty.memory_format", lambda size, dtype=None, **_: Chip(torch.empty(size, dtype=dtype)), "PrivateUse1"
    )
    library.impl("_copy_from", _unseen_copy, "PrivateUse1")
    _library.append(library)
    return torch.device("chip", 0)


def _unseen(size, stride, dtype=None, **_):
    return Chip(torch.empty_strided(size, stride, dtype=dtype))


def _unseen_copy(source, target, non_blocking=False):
    assert isinstance(target, Chip)
    _count("copy", "a list or a number of the host's")
    target.host.copy_(source)
    return target


class Counts(TorchDispatchMode):
    """What happens inside: waits and blocking copies by what and where, copies that nothing waits for, and operators
    that launch a kernel: all but views and new memory."""

    active: "Counts | None" = None

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self.sent, self.kernels = 0, 0
        self.pinned: set[int] = set()

    def __enter__(self) -> "Counts":
        Counts.active = self
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        Counts.active = None
        super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.pop("pin_memory", None):  # a host without an accelerator can't
            out = func(*args, **kwargs)
            self.pinned.add(out.untyped_storage().data_ptr())
            return out
        self.kernels += not func.is_view and func.overloadpacket.__name__ not in _NO_KERNELS
        return _compute(func, args, kwargs)


def _where() -> str:
    """The innermost line of the package, or of whoever else is on the stack."""
    frames = [frame for frame in traceback.extract_stack() if "/tests/support/chip.py" not in frame.filename]
    ours = [frame for frame in frames if frame.filename.startswith(str(ROOT / "ptp_ds"))]
    frame = (ours or frames)[-1]
    return f"{frame.filename.rsplit('/', 2)[-2]}/{frame.filename.rsplit('/', 1)[-1]}: {frame.line}"


def _count(kind: str, what: str) -> None:
    if Counts.active is not None:
        (Counts.active.waits if kind == "wait" else Counts.active.copies)[f"{what} at {_where()}"] += 1


def _compute(func, args, kwargs):
    name = func.overloadpacket.__name__
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    chips = [x for x in tensors if isinstance(x, Chip)]
    on_chip = _target(kwargs, bool(chips))
    _watch(func, name, args, kwargs, tensors, chips, on_chip)
    out = played_kernel(func, *_hosts((args, kwargs))) if name.startswith("_flash_attention") else None
    if out is None:
        host_args, host_kwargs = _hosts((args, kwargs))
        out = func(*host_args, **host_kwargs)
    if not on_chip:
        return out
    known = {id(chip.host): chip for chip in chips}

    def placed(x):  # what is changed in place stays the tensor that it is
        return x if not isinstance(x, Tensor) else known[id(x)] if id(x) in known else Chip(x)

    return tree_map(placed, out)


def _hosts(value):
    def host(x):
        if isinstance(x, Chip):
            return x.host
        return torch.device("cpu") if isinstance(x, torch.device) and x.type == "chip" else x

    return tree_map(host, value)


def _target(kwargs, chips: bool) -> bool:
    """Whether the result lies on the chip."""
    device = kwargs.get("device")
    return torch.device(device).type == "chip" if device is not None else chips


def _watch(func, name, args, kwargs, tensors, chips, on_chip: bool) -> None:
    if name in ("_to_copy", "copy_"):
        source = args[1] if name == "copy_" else args[0]
        if isinstance(source, Chip) != (isinstance(args[0], Chip) if name == "copy_" else on_chip):
            _watch_copy(source, kwargs.get("non_blocking") or (name == "copy_" and args[2:] == (True,)))
        return
    if not chips:
        return
    if name in WAITS or (name == "repeat_interleave" and kwargs.get("output_size") is None):
        _count("wait", name)
    if name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
        x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
    ):
        _count("wait", "boolean index")
    strangers = [x for x in tensors if not isinstance(x, Chip) and x.dim()]
    if strangers and name.startswith("index"):
        _count("copy", "an index of the host's")
    elif strangers:
        raise RuntimeError(f"{func}: tensors on two devices, at {_where()}")


def _watch_copy(source: Tensor, non_blocking: bool) -> None:
    counts = Counts.active
    if counts is None:
        return
    pinned = not isinstance(source, Chip) and source.untyped_storage().data_ptr() in counts.pinned
    if non_blocking and pinned:
        counts.sent += 1
    else:
        _count("copy", "from the device" if isinstance(source, Chip) else "to the device")
