"""Patches: applies those of TorchServe's worker, and says which are active."""

from __future__ import annotations

import logging
from typing import Any

TORCHSERVE = "0.12.0"
REPEATED_FIELDS = "repeated-form-fields"
PATCHES = (REPEATED_FIELDS,)

logger = logging.getLogger(__name__)


def apply(*, is_wanted: bool = True) -> dict[str, bool]:
    """Apply the patches of this worker, if they are wanted and its TorchServe is the version they were written for.

    Returns:
        By name, whether each patch is active. The log says the same.
    """
    import ts  # Only a worker has it; tests and training import this package without.

    is_known = ts.__version__.strip() == TORCHSERVE
    if is_wanted and is_known:
        _keep_repeated_fields()
    active = {REPEATED_FIELDS: is_wanted and is_known}
    said = ", ".join(f"{name} {'active' if is_active else 'off'}" for name, is_active in active.items())
    logger.info("patches for TorchServe %s in this worker of %s: %s", TORCHSERVE, ts.__version__.strip(), said)
    return active


def _keep_repeated_fields() -> None:
    """Make a repeated form field a list of its values; TorchServe keeps the last one without a word.

    `curl -F data=@a.png -F data=@b.png` reaches the worker as two parameters named `data`.
    """
    from ts.service import Service

    original = Service.retrieve_data_for_inference
    if getattr(original, "keeps_repeated_fields", False):
        return

    def retrieve(batch: Any) -> Any:
        for request in batch or ():
            request["parameters"] = _merged(request["parameters"])
        return original(batch)

    retrieve.keeps_repeated_fields = True  # type: ignore[attr-defined]
    Service.retrieve_data_for_inference = staticmethod(retrieve)


def _merged(parameters: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return parameters with each name once; the value of a repeated one is the list of its values."""
    found: dict[str, list[dict[str, Any]]] = {}
    for parameter in parameters:
        found.setdefault(parameter["name"], []).append(parameter)
    return [
        same[0] if len(same) == 1 else {**same[0], "value": [parameter["value"] for parameter in same]}
        for same in found.values()
    ]
