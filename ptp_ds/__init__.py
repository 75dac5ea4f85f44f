"""PTP: prompt tuning of frozen language models with perturbation-based regularisers, on DeepSpeed."""

__version__ = "0.1.0"
