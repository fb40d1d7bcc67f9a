"""`python -m ldm_export`: the command `ldm-export` where its script is not on the path."""

import sys

from ldm_export.cli import main

if __name__ == "__main__":
    sys.exit(main())
