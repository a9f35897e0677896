"""A headless Chromium that opens files, and what it shows."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
WIDTH, HEIGHT = 1280, 1800
NOWHERE = "http://127.0.0.1:9"  # the port of the discard service: nothing listens
TIMEOUT_S = 120


def find_browser() -> str | None:
    """The path of the first Chromium there is."""
    return next((path for path in map(shutil.which, NAMES) if path is not None), None)


@dataclass(frozen=True)
class Browser:
    """program: a Chromium. folder: where it keeps its profile."""

    program: str
    folder: Path

    def run(self, page: Path, *options: str, proxy: str = NOWHERE) -> str:
        """Opens a file without a network, and returns what the browser printed. An AssertionError if it failed."""
        command = [
            self.program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--disable-default-apps", "--disable-features=NetworkTimeServiceQuerying", "--hide-scrollbars",
            "--force-device-scale-factor=1",
            f"--user-data-dir={self.folder}", f"--proxy-server={proxy}", f"--window-size={WIDTH},{HEIGHT}",
            *options, page.as_uri(),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-4000:]}"
        return done.stdout

    def screenshot(self, page: Path, *options: str) -> np.ndarray:
        """[HEIGHT, WIDTH, 3] bytes, red, green, blue."""
        picture = page.with_suffix(".png")
        picture.unlink(missing_ok=True)
        self.run(page, f"--screenshot={picture}", *options)
        assert picture.is_file(), f"no screenshot of {page}"
        with Image.open(picture) as image:
            pixels = np.asarray(image.convert("RGB"))
        assert pixels.shape == (HEIGHT, WIDTH, 3)
        return pixels

    def dom(self, page: Path, *options: str) -> str:
        """The page after its script has run, as HTML."""
        dumped = self.run(page, "--dump-dom", *options)
        assert "</html>" in dumped, f"no page came of {page}"
        return dumped

    def ask(self, page: Path, expression: str) -> Any:
        """The value of a JavaScript expression on a copy of the page whose policy lets the question in."""
        text = without_policy(page.read_text(encoding="utf-8"))
        asking = f"<script>document.body.dataset.answer = encodeURIComponent(JSON.stringify({expression}))</script>"
        copy = page.with_name(f"{page.stem}-asked.html")
        copy.write_text(text.replace("</body>", f"{asking}</body>"), encoding="utf-8")
        answer = re.search(r'data-answer="([^"]*)"', self.dom(copy))
        assert answer is not None, f"{expression} gave no answer"
        return json.loads(unquote(answer[1]))


def without_policy(text: str) -> str:
    """A page without its content security policy."""
    changed = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    assert changed != text, "the page has no policy"
    return changed


def coloured(pixels: np.ndarray, colour: str, tolerance: int = 40) -> np.ndarray:
    """Which pixels are of a colour such as ``#0969da``: [..., 3] bytes -> [...] bools."""
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return np.asarray((np.abs(pixels.astype(int) - wanted) <= tolerance).all(axis=-1))


def curve_heights(mask: np.ndarray) -> np.ndarray:
    """The mean row of the marked pixels of each column, NaN where there are none: [height, width] -> [width]."""
    rows = np.arange(mask.shape[0])[:, None]
    counts = mask.sum(axis=0)
    return np.where(counts > 0, (mask * rows).sum(axis=0) / np.maximum(counts, 1), np.nan)


def misfit(heights: np.ndarray, expected: Sequence[float]) -> float:
    """How far a curve is from the expected one, pixels, after the best shift and stretch of that; inf if it is upside
    down or has no pixels in more than a tenth of the columns."""
    seen = np.isfinite(heights)
    if seen.mean() < 0.9:
        return float("inf")
    values = np.asarray(expected)[seen]
    stretch, shift = np.polyfit(values, heights[seen], 1)
    if stretch > 0:  # rows are counted downwards
        return float("inf")
    return float(np.abs(stretch * values + shift - heights[seen]).max())
