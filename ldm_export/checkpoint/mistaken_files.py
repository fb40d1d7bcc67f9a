"""Files that are taken for checkpoints: what they are, and what to do about them."""

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

#: Bytes at the beginning of a file that tell what it is.
HEAD_BYTES = 512

_TAR_MAGIC, _TAR_MAGIC_AT = b"ustar", 257
_AGAIN = "the download went wrong, get the file again"
#: What a file is by its first bytes, after a byte order mark and blanks.
_MISTAKES: Mapping[bytes, str] = MappingProxyType(
    {
        b"GGUF": "a GGUF file, whose weights are quantised; give the .ckpt or .safetensors",
        b"version https://git-lfs": "a git-lfs pointer; fetch the file itself with `git lfs pull`",
        b"<": f"a web page; {_AGAIN}",
        b"PK\5\6": "an empty zip archive; get the file again",
        b"\x80": "a bare pickle, which only running it could read; save a state dict instead",
    }
)
_INDEX = re.compile(rb'"(?:weight_map|total_size)"')
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.(?:safetensors|bin|ckpt|pt|pth)")
_JOIN = (
    "join its parts into one file first: "
    "`save_file({name: tensor for part in parts for name, tensor in load_file(part).items()}, "
    "'model.safetensors')` with safetensors.torch"
)
_SHOWN = 60


def unreadable(head: bytes) -> str:
    """Return what a file is that is neither torch's nor safetensors, and what to do.

    Args:
        head: Its first `HEAD_BYTES`.
    """
    if head.startswith(_TAR_MAGIC, _TAR_MAGIC_AT):
        return (
            "is a tar archive, which torch before 0.1.10 wrote; convert it with "
            "`torch.save(torch.load(old, weights_only=False), new)` if you trust its source, or, "
            "if it is a packed folder, unpack it and give the checkpoint in it"
        )
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    for magic, explanation in _MISTAKES.items():
        if start.startswith(magic):
            return f"is not a checkpoint but {explanation}"
    if _INDEX.search(start) and start.startswith(b"{"):
        return f"is not a checkpoint but the index of one in several files; {_JOIN}"
    if (text := _text(start)) and start.startswith((b"{", b"[")):
        return f"is not a checkpoint but JSON ({text!r}), such as a server's error; {_AGAIN}"
    if text:
        return (
            f"is neither a torch nor a safetensors file but text ({text!r}); if a server "
            f"sent it instead of the file, {_AGAIN}"
        )
    return (
        f"is neither a torch nor a safetensors file (it begins with {head[:8]!r}); "
        "give a .ckpt, .pt or .safetensors file"
    )


def part_of_several(path: Path) -> str | None:
    """Return that a file is, by its name, one of several that make up a checkpoint, or None."""
    found = _PART.search(path.name)
    if found is None or int(found[2]) < 2:
        return None
    return f"is part {int(found[1])} of {int(found[2])} of one checkpoint; {_JOIN}"


def _text(head: bytes) -> str:
    """Return the first line of a file that is text, shortened, or "" if it is not text."""
    text = head.decode("utf-8", errors="ignore")
    if len(text.encode()) < len(head) - 3:  # more was ignored than a character that was cut
        return ""
    first = text.strip().split("\n")[0].strip()
    is_readable = len(first) >= 2 and first.isprintable() and "\0" not in text
    return "" if not is_readable else first if len(first) <= _SHOWN else f"{first[:_SHOWN]}..."
