"""Train the descendants of the shapes model, and write a checkpoint of each.

    python models/shapes/train_variants.py train NAME    # such as shapes_inpainting; 40 minutes
    python models/shapes/train_variants.py pack NAME     # models/shapes/NAME.ckpt and NAME.yaml

It needs what `train.py` leaves, or its `unpack`; it goes on from the last saved state, and logs to
`log.jsonl`.
"""

import argparse
import sys
from collections.abc import Sequence

from models.shapes.catalog.variants import VARIANTS


def main(argv: Sequence[str] | None = None) -> int:
    """Run one action."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("action", choices=("train", "pack"))
    parser.add_argument("name", choices=VARIANTS)
    args = parser.parse_args(argv)
    from models.shapes.training.variants import pack_variant, train_variant

    variant = VARIANTS[args.name]
    if args.action == "train":
        train_variant(variant)
    else:
        print(f"{variant.name}: {pack_variant(variant):,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
