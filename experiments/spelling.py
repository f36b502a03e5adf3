"""The documents' quiz on code: the lines that they call right, and ways to get them wrong, run as they stand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from experiments.experiment import Figures, Result, Setting, markdown

LINES: tuple[tuple[str, str, tuple[int, ...], str], ...] = (
    ("ten 3×3 filters on a grey picture", "nn.Conv2d(1, 10, 3)", (1, 28, 28), "right"),
    ("", "nn.Conv1d(1, 10, 3)", (1, 28, 28), "wrong"),
    ("", "nn.Linear(1, 10)", (1, 28, 28), "wrong"),
    ("", "nn.Conv2d(10, 1, 3)", (1, 28, 28), "–"),
    ("one filter on 5×5", "nn.Conv2d(1, 1, 3)", (1, 5, 5), "3×3"),
    ("three channels expected, one given", "nn.Conv2d(3, 16, 3)", (1, 28, 28), "error"),
    ("sixteen filters on a colour picture", "nn.Conv2d(3, 16, kernel_size=3)", (3, 32, 32), "right"),
    ("", "nn.Conv2d(16, 3, kernel_size=3)", (3, 32, 32), "–"),
    ("", "nn.Conv2d(3, 16, kernel=3)", (3, 32, 32), "–"),
    ("", "nn.Conv2d(3, 16)", (3, 32, 32), "–"),
    ("", "nn.conv2d(3, 16, kernel_size=3)", (3, 32, 32), "–"),
    ("5×5 on 32×32", "nn.Conv2d(3, 6, 5)", (3, 32, 32), "28×28"),
    ("", "nn.Conv2d(3, 16, 5)", (3, 32, 32), "28×28"),
    ("stride 2, padding 3 on 28×28", "nn.Conv2d(3, 16, 3, stride=2, padding=3)", (3, 28, 28), "larger, or an error"),
    ("5×5 that keeps the size", "nn.Conv2d(1, 1, 5, padding=2)", (1, 28, 28), "padding 2"),
    ("", "nn.Conv2d(1, 1, 5, padding=1)", (1, 28, 28), "–"),
)
"""What is asked, the code, (C, H, W) of its input, what the document says of it; `–` for a line that is ours."""


def outcome(code: str, size: tuple[int, ...]) -> str:
    """Return the shape that a layer makes of a batch of one picture, or the kind of the error.

    Args:
        code: An expression with `nn`.
        size: (C, H, W).
    """
    try:
        layer = eval(code, {"nn": nn})  # noqa: S307  # The lines stand above.
    except (TypeError, AttributeError, ValueError) as err:
        return f"{type(err).__name__}, when it is written"
    try:
        made: Tensor = layer(torch.zeros(1, *size))
    except (RuntimeError, ValueError) as err:
        return f"{type(err).__name__}, when it meets the picture"
    return "×".join(str(length) for length in made.shape[1:])


def run(setting: Setting) -> Result:
    """Run every line."""
    del setting  # There is one size.
    rows = [
        {
            "asked": asked,
            "code": code,
            "input": "×".join(map(str, size)),
            "document": said,
            "found": outcome(code, size),
        }
        for asked, code, size, said in LINES
    ]
    return Result({"lines": rows})


def table(figures: Figures) -> str:
    """Return the table."""
    rows = [(one["asked"], f"`{one['code']}`", one["input"], one["document"], one["found"]) for one in figures["lines"]]
    return markdown(("asked", "code", "picture", "the document", "found"), rows)
