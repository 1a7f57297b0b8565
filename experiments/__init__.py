"""The paper's experiments: `python -m experiments --help`."""

import os
import signal

if "SLURM_JOB_ID" in os.environ:
    # SIGUSR1, which tells of the time limit, would kill what does not listen yet; so it waits until training does.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
