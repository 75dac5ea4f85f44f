"""Matrix products of a piece of work, counted."""

from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode


class Products(TorchDispatchMode):
    """How often each operator runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.times: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.times[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    @property
    def products(self) -> int:
        return sum(self.times[name] for name in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "_linear_pointwise"))
