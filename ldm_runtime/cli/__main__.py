"""`python -m ldm_runtime.cli`: the command `ldm` where its script is not on the path."""

import sys

from ldm_runtime.cli import main

sys.exit(main())
