#!/usr/bin/env bash
# The checks that take minutes each: the embedded model on two ranks.
set -euo pipefail
exec bash "$(dirname "$0")/test.sh" -m slow "$@"
