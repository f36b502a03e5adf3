"""Requests that schemathesis makes of proto/openapi.yaml, good ones and bad ones, for a host to answer as it says."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import schemathesis
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from handlers.api.media import FORMATS, PROTOBUF
from handlers.wire import convscope_pb2 as wire
from tests.pictures import colours, npy, png

ROOT = Path(__file__).resolve().parents[2]
PATH = ROOT / "proto/openapi.yaml"
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
PICTURE = png(colours())
ACCEPTED = itertools.cycle(("*/*", *FORMATS))

schemathesis.openapi.media_type(
    "image/png", st.sampled_from([PICTURE, PICTURE[:60], b""]), aliases=["image/jpeg", "image/webp"]
)
schemathesis.openapi.media_type("application/x-npy", st.sampled_from([npy(colours()), b"\x93NUMPY"]))
schemathesis.openapi.media_type("application/octet-stream", st.just(PICTURE) | st.binary(max_size=100))
schemathesis.openapi.media_type(
    PROTOBUF,
    st.sampled_from([wire.PredictRequest(pictures=[PICTURE], layers=["conv1"]).SerializeToString(), b"", b"\xff"]),
)

CONFIG = {
    "request-timeout": 60,  # The first explanation by gradients builds the network in torch.
    "seed": 0,
    "parameters": {"path.model": "cifar"},
    "generation": {
        "allow-extra-parameters": False,  # HTTP allows headers of any other name.
        "database": "none",
        "deterministic": True,
        "max-examples": 10,
        "with-security-parameters": False,  # Keys are the gateway's.
    },
}
SCHEMA = schemathesis.openapi.from_path(PATH)


def answered_by_hosts(edges_of: str) -> Any:
    """Return the operations to ask a host for: ten requests each, and for some one at each edge of the schemas.

    The others are the same to the letter (test_openapi.py), or the gateway's.

    Args:
        edges_of: The operations whose edges are asked for, as a pattern of method and path.
    """
    without = {"exclude-name-regex": edges_of, "phases": {"coverage": {"enabled": False}}}
    config = schemathesis.Config.from_dict({**CONFIG, "operations": [without]})
    schema = schemathesis.openapi.from_path(PATH, config=config)
    return schema.exclude(method="PUT").exclude(path_regex="{version}|openapi")


def check(case: schemathesis.Case, url: str) -> None:
    """Send a request to a host, in turn for each format, and hold the response to the document."""
    # In a form a number where words belong is words too; test_carriers.py holds forms to the other carriers.
    unchecked = [negative_data_rejection] if case.media_type == "multipart/form-data" else []
    accept = {"Accept": next(ACCEPTED)}
    case.call_and_validate(base_url=url, headers=accept, checks=CHECKS, excluded_checks=unchecked)
