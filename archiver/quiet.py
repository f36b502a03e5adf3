"""Hides the warnings and log lines of libraries while a network is archived.

Their warnings are about code that the user cannot change. A warning that points at a line of the user's own file may
concern the network, so it is shown, unless Python itself hides its kind, such as a DeprecationWarning.
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
"""The packages whose loggers are silenced."""

_FOR_DEVELOPERS = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)  # Python's default.
_LONGEST = 300  # Characters of a reported warning.


@contextmanager
def quiet_libraries(report: Callable[[str], None] = lambda _: None) -> Iterator[None]:
    """Hide the warnings and log lines of libraries inside the context.

    Python's option `-W` and `PYTHONWARNINGS` take precedence: with either, warnings are shown as they configure.

    Args:
        report: Called once with each warning that points at the source of the network that is being archived, except
            those for developers, which only Python's option shows.
    """
    names = [name for name in logging.root.manager.loggerDict if name.partition(".")[0] in LIBRARIES]
    levels = {logger: logger.level for logger in map(logging.getLogger, (*LIBRARIES, *names))}
    reported: set[str] = set()

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
        if place and text not in reported:
            reported.add(text)
            report(text)

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
    """Return the name inside the archive of a user's file; empty for a file of convscope or of an installed package."""
    try:
        unpacked, top, *rest = Path(filename).relative_to(tempfile.gettempdir()).parts
    except ValueError:
        return ""
    if not unpacked.startswith(UNPACKED) or any((folder / top).exists() for folder in installation_folders()):
        return ""
    return "/".join((top, *rest))
