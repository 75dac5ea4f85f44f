"""`python -m ptp_ds COMMAND`: the `ptp` command where it isn't installed."""

import sys

from ptp_ds.commands.ptp import main

sys.exit(main())
