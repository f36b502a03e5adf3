"""The gateway's configuration beside the handler that it serves."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from handlers.api.options import OPTION_NAMES

ENVOY = Path(__file__).parents[2] / "deploy/envoy"


def manager() -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((ENVOY / "http.yaml").read_text())["resources"][0]["typed_config"]
    return config


def test_every_header_that_is_an_option_is_joined_where_it_is_repeated() -> None:
    [join] = [one["typed_config"] for one in manager()["http_filters"] if one["name"] == "join"]
    [names] = re.findall(r"OPTIONS = \{(.*)\}", join["default_source_code"]["inline_string"])
    assert re.findall(r'"([^"]*)"', names) == [name.replace("_", "-") for name in OPTION_NAMES]


def test_no_replica_is_ejected_for_errors_that_callers_can_cause() -> None:
    for cluster in yaml.safe_load((ENVOY / "clusters.yaml").read_text())["resources"]:
        detection = cluster["outlier_detection"]
        assert (detection["enforcing_consecutive_5xx"], detection["enforcing_success_rate"]) == (0, 0)
        assert detection["split_external_local_origin_errors"] is True


def test_the_method_is_told_and_a_query_string_refused_wherever_rest_is_routed() -> None:
    [host] = manager()["route_config"]["virtual_hosts"]
    refusing, routed = [route for route in host["routes"] if route["name"] == "rest"]
    assert refusing["direct_response"]["status"] == 400
    assert {"name": ":path", "string_match": {"contains": "?"}} in refusing["match"]["headers"]
    assert routed["match"]["headers"] == refusing["match"]["headers"][:2]
    assert routed["match"]["safe_regex"] == refusing["match"]["safe_regex"]
    [added] = routed["request_headers_to_add"]
    assert (added["header"]["key"], added["header"]["value"]) == ("x-convscope-method", "%REQ(:METHOD)%")
    assert added["append_action"] == "OVERWRITE_IF_EXISTS_OR_ADD"


def test_the_gateway_starts_whatever_the_replicas_do() -> None:
    compose = yaml.safe_load((ENVOY.parents[1] / "docker-compose.yml").read_text())
    assert "depends_on" not in compose["services"]["gateway"]


def test_whoever_is_answered_is_named_by_the_gateway_alone() -> None:
    """The name of the key is a label of metrics: were a caller able to choose it, there would be no bound to them."""
    [mutation] = manager()["early_header_mutation_extensions"]
    [change] = mutation["typed_config"]["mutations"]
    assert change["append"]["header"] == {"key": "x-convscope-caller", "value": "none"}
    assert change["append"]["append_action"] == "OVERWRITE_IF_EXISTS_OR_ADD"


def test_no_replica_gets_pings_over_grpc() -> None:
    """A gRPC server closes a connection with more pings than one in 5 min; its requests fail."""
    assert "connection_keepalive" not in (ENVOY / "clusters.yaml").read_text()


def test_the_description_is_that_of_the_contract_and_needs_no_key() -> None:
    description = yaml.safe_load((ENVOY.parents[1] / "proto/openapi.yaml").read_text())
    served = ENVOY / "openapi.json"
    assert json.loads(served.read_text()) == description, "run `make proto`"
    config = manager()["route_config"]
    assert served.stat().st_size <= config["max_direct_response_body_size_bytes"]
    [route] = [one for one in config["virtual_hosts"][0]["routes"] if one["name"] == "openapi"]
    assert route["match"]["path"] in description["paths"]
    assert description["paths"][route["match"]["path"]]["get"]["security"] == []
    assert route["direct_response"]["body"]["filename"] == f"/etc/envoy/{served.name}"
    assert {name for name, one in route["typed_per_filter_config"].items() if one["disabled"]} == {"api_keys"}
