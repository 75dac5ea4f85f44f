"""PTP: prompt tuning of frozen language models with perturbation-based regularisers, on DeepSpeed.

    result = ptp_ds.train(task="Reviews", perturbation="pgd", output_dir="runs/reviews")
    predictor = ptp_ds.Predictor.from_pretrained(result.adapter)
    predictor.predict([{"review": "A quiet film that stays with you."}])

train, Result, StopRun   one run, or several at once, from Python (ptp_ds.api.run)
Predictor                a saved adapter's answers, generated text and embeddings (ptp_ds.api.predictor)
RunConfig, load_task     the settings of a run; a task by its name or template
trainer                  PTPTrainer and ptp_loss, for loops of one's own
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ptp_ds.api.predictor import Predictor
    from ptp_ds.api.run import Result, StopRun, train
    from ptp_ds.config.run_config import RunConfig
    from ptp_ds.tasks import load_task

_WHERE = {
    "Predictor": "ptp_ds.api.predictor", "Result": "ptp_ds.api.run", "StopRun": "ptp_ds.api.run",
    "train": "ptp_ds.api.run", "RunConfig": "ptp_ds.config.run_config", "load_task": "ptp_ds.tasks",
}  # fmt: skip
__all__ = ["Predictor", "Result", "RunConfig", "StopRun", "__version__", "load_task", "train"]


def __getattr__(name: str) -> Any:
    """The names above, imported when they are first asked for: `import ptp_ds` brings no torch."""
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
