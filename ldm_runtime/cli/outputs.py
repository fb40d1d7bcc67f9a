"""Where `ldm generate` writes its images: numbered files of a folder, named files, or stdout."""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from ldm_runtime.durable import remove_stale_parts
from ldm_runtime.errors import RequestError
from ldm_runtime.pipeline.file_names import IMAGE_SUFFIXES, is_folder, pattern_paths
from ldm_runtime.pipeline.results import Result

_STDOUT = "-"
_FOLDER = Path("out")

#: Writes the images of a result and returns their files.
WriteImages = Callable[[Result], Sequence[Path]]


def add_output_arguments(parser: argparse._ActionsContainer) -> None:
    """Add `--output` and `--out-dir`."""
    parser.add_argument(
        *("-o", "--output"),
        metavar="FILE",
        help="the image's file, replaced if it is there; for several images a pattern such as "
        "'out/{index:04d}-{seed}.png'; - is standard output",
    )
    parser.add_argument(
        "--out-dir",
        metavar="FOLDER",
        help="folder for the images, as 0000-seed7.png and on; nothing is replaced (default: out)",
    )


def image_writer(args: argparse.Namespace, seeds: Sequence[int]) -> WriteImages:
    """Return the function that writes the results of a command, in their order.

    Args:
        args: The command's arguments.
        seeds: The seed of every image to come.

    Raises:
        RequestError: The place cannot be what the flag says, or a pattern names no or too few
            files. Nothing is written before.
    """
    if args.output is not None and args.out_dir is not None:
        raise RequestError("output", "does not go with --out-dir; put the folder into -o FILE")
    if args.output == _STDOUT:
        if sys.stdout is None:
            raise RequestError("output", "is standard output, which is closed; give a file")
        _check_alone(args, seeds)
        return _write_to_stdout
    if args.output is None or is_folder(args.output):
        folder = _folder(args)
        remove_stale_parts(folder)
        return partial(_write_numbered, folder)
    return partial(_write_named, iter(pattern_paths(args.output, seeds)))


def _folder(args: argparse.Namespace) -> Path:
    if args.output is not None:
        return Path(args.output)
    folder = _FOLDER if args.out_dir is None else Path(args.out_dir)
    if args.out_dir == _STDOUT:
        raise RequestError("out_dir", "must be a folder; `-o -` writes to standard output")
    if folder.is_file():
        raise RequestError("out_dir", f"{folder} is a file; give a folder, or -o FILE")
    if folder.suffix.lower() in IMAGE_SUFFIXES and not folder.exists():
        raise RequestError("out_dir", f"must be a folder; `-o {folder}` names the image's file")
    return folder


def _check_alone(args: argparse.Namespace, seeds: Sequence[int]) -> None:
    if len(seeds) != 1:
        raise RequestError(
            "output", f"standard output takes one image, and this makes {len(seeds)}; give -o FILE"
        )
    if args.json:
        raise RequestError("output", "`-o -` does not go with --json, which prints there as well")


def _write_numbered(folder: Path, result: Result) -> Sequence[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    return result.save_all(folder)


def _write_named(paths: Iterator[Path], result: Result) -> Sequence[Path]:
    written = []
    for index in range(len(result)):
        path = next(paths)
        result.save(path, index)
        written.append(path)
    return written


def _write_to_stdout(result: Result) -> Sequence[Path]:
    """Write the bytes of the file that another name would have got."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "image.png"
        result.save(path)
        sys.stdout.buffer.write(path.read_bytes())
    sys.stdout.buffer.flush()
    return ()
