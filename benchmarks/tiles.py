"""Measure the costs and savings of decoding in tiles: images of 512x512 against those in one piece.

    python benchmarks/tiles.py

Uses the shapes model, exported on first use, on the CPU. Prints a table in Markdown of PSNR by
background and tile, and below it the memory that 1024x1024 pixels take in tiles, next to the scores
of one attention that they take in one piece, which are computed and not run.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ldm_runtime import Generator, LdmError
from ldm_runtime.backends.host_memory import least_bytes
from ldm_runtime.diagnostics.measures import psnr
from measuring.rows import machine
from measuring.shapes_bundle import shapes_bundle
from released.full_size_probe import bytes_of_decoding

if TYPE_CHECKING:
    from models.shapes.data import scenes

_SIDE = 8  # scenes per side of a large image
_TILES = (8, 16, 32, 64, 96)  # latent pixels
_LARGE, _SMALL_TILE = 256, 64  # latent pixels, for the memory

UInt8Array = npt.NDArray[np.uint8]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command: 0 on success, 1 for an error the user can act on, 2 for bad usage."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.parse_args(argv)
    try:
        with Generator(shapes_bundle(), backend="onnxruntime") as generator:
            taken = memory(generator)  # first: what other calls leave behind would hide it
            print("\n".join([*table(generator), "", taken, f"({machine()})"]))
    except LdmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def table(generator: Generator) -> Iterator[str]:
    """Yield the lines of a table: how near images in tiles are to those in one piece."""
    factor = generator.spec.autoencoder.factor
    yield (
        " | ".join(("| background", *(f"tiles of {tile} latent pixels" for tile in _TILES))) + " |"
    )
    yield "|---" * (1 + len(_TILES)) + "|"
    for name, image in images(_SIDE):
        latents = generator.encode(image)
        whole, *tiled = (
            np.asarray(generator.decode(latents, tile_size=factor * tile)[0])
            for tile in (0, *_TILES)
        )
        yield " | ".join((f"| {name}", *(f"{psnr(each, whole):.1f} dB" for each in tiled))) + " |"


def memory(generator: Generator) -> str:
    """Return the memory of a large image without the loaded networks, in tiles and in one piece."""
    spec = generator.spec
    shape = (1, spec.autoencoder.embed_dim, _LARGE, _LARGE)
    latents = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    taken = bytes_of_decoding(generator, latents, spec.autoencoder.factor * _SMALL_TILE)
    axes = {"batch": 1, "height": _LARGE, "width": _LARGE}
    side = _LARGE * spec.autoencoder.factor
    return (
        f"{side}x{side} pixels in tiles of {_SMALL_TILE} latent pixels: {taken / 1e6:,.0f} MB; "
        f"in one piece at least {least_bytes('vae_decoder', spec, axes) / 1e6:,.0f} MB"
    )


def images(side: int) -> Iterator[tuple[str, UInt8Array]]:
    """Yield backgrounds and large images on them, `side` times `side` scenes each."""
    for background in ("white", "black", "gray"):
        yield background, large_scene(side, background, gradient=False)
    yield "gray gradient", large_scene(side, "gray", gradient=True)
    yield "several, which this model cannot generate", _tiled(side, _sampled_scenes())


def large_scene(side: int, background: str, *, gradient: bool) -> UInt8Array:
    """Return `side` times `side` scenes with the same background as one image."""
    return _tiled(
        side,
        (
            scene
            for scene in _sampled_scenes()
            if (scene.background, scene.gradient) == (background, gradient)
        ),
    )


def _sampled_scenes() -> "Iterator[scenes.Scene]":
    from models.shapes.data import scenes

    return scenes.random_scenes(np.random.default_rng(3), held_out=True)


def _tiled(side: int, sampled: "Iterator[scenes.Scene]") -> UInt8Array:
    from models.shapes.data import scenes

    rows = [
        np.hstack([scenes.render(each) for each in itertools.islice(sampled, side)])
        for _ in range(side)
    ]
    image: UInt8Array = np.rint(np.vstack(rows) * 255).astype(np.uint8)
    return image


if __name__ == "__main__":
    sys.exit(main())
