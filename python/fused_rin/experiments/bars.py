"""Progress bars, and lines above them, that fit the terminal."""

from __future__ import annotations

import os
import sys
from typing import Any, TextIO

from tqdm import tqdm

WIDTH = 80  # of a terminal that does not say
BAR = 10  # columns that the bar itself has at least; all else is shortened before
# What stands behind the label, from all to the least.
FORMS = (
    "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]",
    "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
    "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]",
    "{percentage:3.0f}%|{bar}|",
)
LABEL = 24  # columns of a label that is not shortened for the sake of the next longer form


def columns(stream: TextIO | None) -> int | None:
    """The columns of the terminal behind a stream; None for a file or a pipe. $COLUMNS goes before what is there."""
    if (named := os.environ.get("COLUMNS", "")).isdecimal() and int(named):
        return int(named)
    try:
        if stream is None or not stream.isatty():
            return None
        return os.get_terminal_size(stream.fileno()).columns or WIDTH
    except (OSError, ValueError):
        return WIDTH


def shorten(text: str, width: int) -> str:
    """`text`, or its two ends where it is longer than `width`: "[12/60] seque..dt-seed0"."""
    if len(text) <= width:
        return text
    kept = width - 2
    if kept < 2:
        return text[: max(width, 0)]
    return text[: kept - kept // 2] + ".." + text[len(text) - kept // 2 :]


class Bar(tqdm):
    """tqdm's bar on stderr, where that is a terminal; in every width so that the bar itself can be seen.

    Args:
        label: what of; in a narrow terminal without its middle. line: below how many others it stands.
    """

    def __init__(self, label: str = "", line: int = 0, **options: Any):
        super().__init__(desc=label, position=line, disable=None, **options)

    def __str__(self) -> str:
        given = {**self.format_dict, "prefix": "", "ncols": columns(sys.stderr) or WIDTH}
        label = self.desc.removesuffix(": ")
        for form in FORMS:
            rest = len(self.format_meter(**{**given, "bar_format": form.replace("{bar}", "")})) + len(": ")
            room = given["ncols"] - rest - BAR
            if room >= min(len(label), LABEL):
                break
        given["prefix"] = f"{shorten(label, room)}: " if label and room > 0 else ""
        return str(self.format_meter(**{**given, "bar_format": "{desc}" + form}))


def say(label: str, *texts: str) -> None:
    """Prints "label: text" on stdout, above the bars, at once also where it goes into a pipe.

    Args:
        texts: the same in several lengths, the longest first: the first that fits is taken. The label is shortened
        if none does.
    """
    width = columns(sys.stdout)
    text = next((text for text in texts if width is None or len(label) + 2 + len(text) <= width), texts[-1])
    room = len(label) if width is None else width - 2 - len(text)
    label = shorten(label, room)
    tqdm.write(f"{label}: {text}" if label else text, file=sys.stdout)
    if sys.stdout is not None:
        sys.stdout.flush()
