"""`python -m ldm_runtime`: the command `ldm` where its script is not on the path."""

import sys

from ldm_runtime.cli import main

if __name__ == "__main__":
    sys.exit(main())
