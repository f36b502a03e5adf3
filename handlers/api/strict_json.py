"""JSON in requests: a name that occurs twice is an error, since one of its values would be ignored."""

from __future__ import annotations

import json
from typing import Any


class RepeatedName(ValueError):
    """An object has the same name twice."""


def loads(text: str | bytes | bytearray) -> Any:
    """Parse JSON.

    Args:
        text: Bytes are UTF-8.

    Raises:
        ValueError: It is not valid JSON, is nested too deeply, or has an object with the same name twice; the message
            is for the caller.
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
