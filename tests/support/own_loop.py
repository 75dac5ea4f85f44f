"""A loop of one's own around tiny models, whose configurations name no special tokens."""

from functools import partial

import ptp_ds.trainer

ptp_loss = partial(ptp_ds.trainer.ptp_loss, special_ids=())
