"""TorchServe answers as proto/openapi.yaml says, whatever schemathesis asks it."""

from __future__ import annotations

import schemathesis

from tests.contract.openapi import answered_by_hosts, check
from tests.server.harness import Launched

# Explanations have the same schemas as predictions.
OPERATIONS = answered_by_hosts(edges_of="/predictions/")


@OPERATIONS.parametrize()
def test_good_requests_and_bad_ones_get_what_is_described(case: schemathesis.Case, server: Launched) -> None:
    check(case, f"http://127.0.0.1:{server.port('REST')}")
