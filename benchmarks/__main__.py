"""`python -m benchmarks`."""

import signal
import sys

from benchmarks.cli import main

if __name__ == "__main__":
    # an exception on its way out ends the job's process too, which a signal alone would leave at work beside the next measurement
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
