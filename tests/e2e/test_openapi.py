"""TorchServe answers as proto/openapi.yaml says, whatever schemathesis asks it."""

from __future__ import annotations

import schemathesis

from tests.contract.openapi import ANSWERED_BY_HOSTS, check
from tests.server.harness import Launched


@ANSWERED_BY_HOSTS.parametrize()
def test_good_requests_and_bad_ones_get_what_is_described(case: schemathesis.Case, server: Launched) -> None:
    check(case, f"http://127.0.0.1:{server.port('REST')}")
