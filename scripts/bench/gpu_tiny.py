#!/usr/bin/env python
"""Writes a tiny random Llama and its tokenizer into a folder: what a dry run of scripts/gpu_check.sh trains."""

import argparse
import sys
from pathlib import Path

from tests.support.tiny import write_tiny_model


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    write_tiny_model(parser.parse_args().folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
