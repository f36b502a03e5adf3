"""Repeated form fields, which TorchServe 0.12 would lose.

`curl -F data=@a.png -F data=@b.png` reaches the worker as two parameters named `data`, and `ts.service.Service` puts
them into a dict, where the last one wins without a word. Here they become one parameter whose value is the list of
both. TorchServe 0.12 is its last release, so the method replaced here does not move.
"""

from __future__ import annotations

from typing import Any

Parameter = dict[str, Any]


def keep_repeated() -> None:
    """Make TorchServe in this worker hand over repeated fields as lists; calling it again changes nothing."""
    from ts.service import Service  # Only a worker has it; tests and training import this package without.

    original = Service.retrieve_data_for_inference
    if getattr(original, "keeps_repeated", False):
        return

    def retrieve(batch: list[dict[str, Any]] | None) -> Any:
        for request in batch or []:
            request["parameters"] = merge(request["parameters"])
        return original(batch)

    retrieve.keeps_repeated = True  # type: ignore[attr-defined]
    Service.retrieve_data_for_inference = staticmethod(retrieve)


def merge(parameters: list[Parameter]) -> list[Parameter]:
    """Join parameters of one name, in order, into one whose value is the list of theirs."""
    names = [parameter["name"] for parameter in parameters]
    if len(set(names)) == len(names):
        return parameters
    merged: dict[str, Parameter] = {}
    for parameter in parameters:
        name = parameter["name"]
        if name not in merged:
            merged[name] = dict(parameter)
            continue
        first = merged[name]
        first["value"] = [
            *(first["value"] if isinstance(first["value"], list) else [first["value"]]),
            parameter["value"],
        ]
    return list(merged.values())
