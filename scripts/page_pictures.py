"""Take the screenshots of the page in docs/serving.md: `python -m scripts.page_pictures`.

Needs the bundle of `make demo`, the extra `test` and Debian's package chromium. The server is
`ldm serve`, and the images are of fixed seeds, so that the screenshots change with the page alone.
"""

import argparse
import io
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
SCREENSHOTS = ROOT / "docs/screenshots"

_PROMPTS = (
    "a small green triangle above a large yellow square on a gray background",
    "a large blue circle right of a small red square on a white background",
    "a large red circle left of a small blue square on a white background",
)
_SEED = 7
_WIDTH, _HEIGHT = 1240, 860  # pixels of the window
_MAX_BYTES = 150_000
_LISTENING = "listening on "


def main(argv: Sequence[str] | None = None) -> int:
    """Take both screenshots."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, default=ROOT / "engines", help="a bundle")
    args = parser.parse_args(argv)
    chromium = shutil.which("chromium")
    if chromium is None:
        parser.error("Chromium is not installed: apt-get install chromium")
    SCREENSHOTS.mkdir(exist_ok=True)
    with _serving(args.bundle) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        _save(_history(browser, address), SCREENSHOTS / "page.webp")
        _save(_comparison(browser, address), SCREENSHOTS / "page_comparison.webp")
        browser.close()
    return 0


@contextmanager
def _serving(bundle: Path) -> Iterator[str]:
    """Run `ldm serve` on a free port until the end of the block; yields the address."""
    command = [sys.executable, "-m", "ldm_runtime", "serve", str(bundle), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None, "it is a pipe"
            yield _address(process.stderr)
        finally:
            process.terminate()


def _address(messages: IO[str]) -> str:
    """Return the address in the messages of a server.

    Raises:
        RuntimeError: The server ended without one.
    """
    said = []
    for line in messages:
        said.append(line)
        if _LISTENING in line:
            return line.partition(_LISTENING)[2].strip()
    raise RuntimeError("the server did not start: " + "".join(said))


def _history(browser: Browser, address: str) -> bytes:
    """Return a screenshot of the page after a few requests, in light colours."""
    page = _opened(browser, address, "light")
    for prompt in _PROMPTS:
        _generate(page, prompt, _SEED)
    return page.screenshot(full_page=True)


def _comparison(browser: Browser, address: str) -> bytes:
    """Return a screenshot of two seeds side by side, in dark colours."""
    page = _opened(browser, address, "dark")
    _generate(page, _PROMPTS[0], _SEED)
    page.get_by_role("button", name="Compare").click()
    _generate(page, _PROMPTS[0], _SEED + 1)
    return page.screenshot(full_page=True)


def _opened(browser: Browser, address: str, scheme: str) -> Page:
    page = browser.new_page(viewport={"width": _WIDTH, "height": _HEIGHT})
    page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
    page.goto(address)
    return page


def _generate(page: Page, prompt: str, seed: int) -> None:
    """Fill the form in, and wait for the image."""
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_label("Seed", exact=True).fill(str(seed))
    page.get_by_role("button", name="Generate").click()
    page.locator("#history").get_by_alt_text(f"{prompt}, seed {seed}").wait_for()


def _save(screenshot: bytes, path: Path) -> None:
    """Write a screenshot as WebP.

    Raises:
        ValueError: It is too large for the repository.
    """
    Image.open(io.BytesIO(screenshot)).save(path, quality=85, method=6)
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; at most {_MAX_BYTES} are wanted")


if __name__ == "__main__":
    sys.exit(main())
