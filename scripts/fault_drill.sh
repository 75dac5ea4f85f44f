#!/usr/bin/env bash
# Makes every fault for real, on two ranks of a tiny model, and prints the table: fault, how it was made, what the user
# sees, what was lost. A few minutes on two cores; arguments go to pytest (-k signals). As root the disks are small
# mounts; where mounting is not allowed those rows are skipped with a reason.
set -euo pipefail
cd "$(dirname "$0")/.."
exec bash scripts/test.sh -q -m drill tests/commands/test_drill.py "$@"
