"""This host answers as proto/openapi.yaml says, whatever schemathesis asks it."""

from __future__ import annotations

import schemathesis

from tests.contract.openapi import answered_by_hosts, check
from tests.kserve.conftest import Host
from tests.thorough import THOROUGH

# Of a request's body and options the handlers decide alone, and tests/e2e asks TorchServe for all edges.
OPERATIONS = answered_by_hosts(edges_of="/predictions/" if THOROUGH else "GET /predictions/")


@OPERATIONS.parametrize()
def test_good_requests_and_bad_ones_get_what_is_described(case: schemathesis.Case, host: Host) -> None:
    check(case, f"http://{host.http}")
