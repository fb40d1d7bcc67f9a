"""Write docs/released-models.md from measured rows: `python -m scripts.released_page`.

The rows are those that `benchmarks/full_size.py` wrote, so that the page says nothing that was not
measured.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from measuring.rows import read_records
from released.full_size_report import report
from scripts.pages import write_page

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/released-models.md"
ROWS = ROOT / "benchmarks/results/full_size.jsonl"

_INTRODUCTION = """\
# Released models at their released size

<!-- Written by `python -m scripts.released_page`; change that script, not this page. -->

The released weights cannot be had where this is built. So each model is written as a checkpoint of
its released layout and size with random weights. Then it is recognised, exported, its golden images
are generated again, its fp16 graphs run at its own size and are searched for values beyond fp16 (an
autoencoder alone at no more than 256×256 pixels), and its TensorRT-RTX engines are built without a
GPU for compute capability 8.0, 8.6, 8.9, 12.0 and 12.1. `benchmarks/full_size.py` does it all; the
machine is a virtual one with 2 cores of an AMD EPYC and 24 GB, on 2026-11-26; for those of Stable
Diffusion on 2026-12-02, of which SDXL and others have no row yet.

"""

_LEGEND = """
* **fp32 error**: the largest of any network, of the fp32 graph against torch, relative to the
  largest value. The bound is 1e-4.
* **fp16 L2**: the largest relative L2 error of the fp16 graphs. The bound is 5e-3.
* **decode**: the memory to decode one image of 256×256 in addition to the loaded network. A VQ
  autoencoder compares with at most 1,024 codes at a time, so the comparison adds next to nothing.
* **golden**: the worst golden image against torch's over the checkpoint's own weights. The bound is
  35 dB for weights in fp16. With a codebook, random weights leave many latents half-way between two
  codes.
* Datasets that share a model share a row: FFHQ and LSUN-beds with CelebA-HQ, semantic synthesis at
  512 with 256.
* lsun_churches256 was exported by a version that compares autoencoders at smaller sizes (before:
  317 s and 11.3 GB), the others by the version before it.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page."""
    return write_page(__doc__, PAGE, page, argv)


def page() -> str:
    """Return the page."""
    return _INTRODUCTION + "\n".join(report(read_records(ROWS))) + "\n" + _LEGEND


if __name__ == "__main__":
    sys.exit(main())
