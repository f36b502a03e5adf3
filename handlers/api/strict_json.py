"""JSON in requests, of which nothing is ignored: a name that occurs twice, or is not known, is an error."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from handlers.api.errors import BadRequest


class RepeatedName(ValueError):
    """An object has the same name twice."""


def loads(text: str | bytes | bytearray) -> Any:
    """Parse JSON.

    Args:
        text: JSON; bytes are UTF-8.

    Raises:
        ValueError: The text is not valid JSON, is nested too deeply, or has an object with the same name twice; the
            message is for the caller.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RepeatedName:
        raise
    except json.JSONDecodeError as err:
        raise ValueError(f"{err.msg} at line {err.lineno}, column {err.colno}") from err
    except UnicodeDecodeError as err:
        raise ValueError("it is not UTF-8 text") from err
    except ValueError as err:
        raise ValueError("a number in it has too many digits") from err
    except RecursionError as err:
        raise ValueError("it is nested too deeply") from err


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise RepeatedName(f"{json.dumps(name[:40])} is given twice")
        found[name] = value
    return found


def check_names(names: Iterable[str], known: tuple[str, ...], where: str = "") -> None:
    """Check the names of fields.

    Raises:
        BadRequest: A name is unknown.
    """
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise BadRequest(f"unknown field {json.dumps(unknown[0][:40])}{where}; there are {', '.join(known)}")


def whole(value: Any, name: str, *, least: int = 0) -> int:
    """Return a value that is a whole number of at least `least`.

    Raises:
        BadRequest: The value is not, or has more than 32 bits.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**32:
        raise BadRequest(f"{name} must be a whole number, at least {least}, in 32 bits")
    return value
