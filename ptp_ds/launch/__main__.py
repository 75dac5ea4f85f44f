"""`python -m ptp_ds.launch`: the `deepspeed` command where scripts/setup_env.sh hasn't installed it."""

import sys

from ptp_ds.launch.launcher import main

sys.exit(main())
