"""Quiet: warnings and log lines of libraries are not shown while a network is archived.

They tell of what a user cannot change. A warning that points at a line of the user's own file may say something about
the network, so it stays, unless it is of a kind that Python itself hides, such as a DeprecationWarning.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from archiver.architecture import UNPACKED
from archiver.packages import installation_folders

LIBRARIES = ("torch", "torchvision", "timm", "onnx", "onnx_ir", "onnxscript", "onnxruntime")
"""Whose loggers are silent."""

_FOR_DEVELOPERS = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)  # As Python has it.
_LONGEST = 300  # Characters of a warning that are told.


@contextmanager
def quiet_libraries(tell: Callable[[str], None] = lambda _: None) -> Iterator[None]:
    """Show no warning and no log line of a library for as long as the context lasts.

    Python's own option `-W` and `PYTHONWARNINGS` go before: with either, warnings are shown as it says.

    Args:
        tell: Is told each warning that points at the source of the network that is being archived, once; none of those
            for developers, which only Python's option shows.
    """
    names = [name for name in logging.root.manager.loggerDict if name.partition(".")[0] in LIBRARIES]
    levels = {logger: logger.level for logger in map(logging.getLogger, (*LIBRARIES, *names))}
    told: set[str] = set()

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        place = _own_source(filename)
        text = f"{place}, line {lineno}: {category.__name__}: {' '.join(str(message).split())[:_LONGEST]}"
        if place and text not in told:
            told.add(text)
            tell(text)

    try:
        for logger in levels:
            logger.setLevel(logging.CRITICAL + 1)
        with warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.simplefilter("default")
                for category in _FOR_DEVELOPERS:
                    warnings.simplefilter("ignore", category)
                warnings.showwarning = show
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


def _own_source(filename: str) -> str:
    """Return a file's name inside the archive if it is the user's; empty for an installed package's, and for ours."""
    try:
        unpacked, top, *rest = Path(filename).relative_to(tempfile.gettempdir()).parts
    except ValueError:
        return ""
    if not unpacked.startswith(UNPACKED) or any((folder / top).exists() for folder in installation_folders()):
        return ""
    return "/".join((top, *rest))
