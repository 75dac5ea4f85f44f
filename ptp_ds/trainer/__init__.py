"""PTP in a loop of your own: a loss for any transformers or peft model, and transformers' Trainer with it.

Here a batch is padded and every pass runs over the whole of it, prompt and all, as plain loops do; ptp_ds.train packs
rows, computes the prompt once and gathers each layer once for both streams.
"""

from ptp_ds.trainer.loss import PTPLoss, ptp_loss
from ptp_ds.trainer.settings import PTPSettings
from ptp_ds.trainer.trainer import PTPMixin, PTPTrainer

__all__ = ["PTPLoss", "PTPMixin", "PTPSettings", "PTPTrainer", "ptp_loss"]
