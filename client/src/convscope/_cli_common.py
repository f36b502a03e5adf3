"""What the commands have in common: how they read what options are given, and how they write JSON."""

from __future__ import annotations

import argparse
import json
import math

METHODS = ("grad_cam", "cam", "occlusion", "input_gradient", "integrated_gradients")


def name(text: str) -> str:
    """Read `cifar`: anything but nothing."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def model(text: str) -> str:
    """Read a model's name, or a version."""
    from convscope._request import check_model  # Here, so that --help need not wait for protobuf.

    try:
        check_model(text, None)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("model ")) from error
    return text


def names(text: str) -> list[str]:
    """Read `conv1,conv2`."""
    found = [name.strip() for name in text.split(",") if name.strip()]
    if not found:
        raise argparse.ArgumentTypeError(f"name at least one, as in A,B, not {text!r}")
    return found


def models(text: str) -> list[str]:
    """Read `cifar,digits`."""
    return [model(name) for name in names(text)]


def numbers(text: str) -> list[float]:
    """Read `1,2,4`."""
    found = [float(number) for number in text.split(",") if number.strip()]
    if not found or not all(map(math.isfinite, found)):
        raise argparse.ArgumentTypeError(f"finite numbers, as in 1,2,4, not {text!r}")
    return found


def channels(text: str) -> int | list[int]:
    """Read `4`, the four strongest, or `0,3,5`, those."""
    return [int(number) for number in names(text)] if "," in text else int(text)


def request_id(text: str) -> str:
    """Read an id that a request may have."""
    from convscope._request import choose_request_id  # Here, so that --help need not wait for protobuf.

    try:
        return choose_request_id(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def as_json(answer: object, *, indent: int | None = 2) -> str:
    """Return an answer as JSON: letters as they are, or escaped where a file's name holds bytes that are no letters."""
    text = json.dumps(answer, indent=indent, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(answer, indent=indent)
    return text
