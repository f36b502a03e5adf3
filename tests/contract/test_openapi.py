"""proto/openapi.yaml held to the code: each name, range, default and code in it. The hosts: tests/e2e, tests/kserve."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import jsonschema
import jsonschema_rs
import pytest
import schemathesis
import yaml
from convscope import RequestRejected

from handlers.api.errors import BadRequest, RequestError
from handlers.api.job import Job
from handlers.api.media import FORMATS, JSON, PROTOBUF
from handlers.api.options import DTYPES, METHODS, OPTION_NAMES, VIEWS, Explain, Options
from handlers.api.request import parse
from handlers.images.preprocessing import CONTAIN, COVER, FILTERS
from handlers.network import layouts
from handlers.network.archive import SCORES
from handlers.wire import convscope_pb2 as wire
from server.kserve.errors import STATUS
from tests.contract.openapi import PATH, ROOT, SCHEMA
from tests.contract.requests import FIELDS

DOCUMENT: dict[str, Any] = yaml.safe_load(PATH.read_text())
TRACE = ("traceparent", "tracestate")
SCHEMAS: dict[str, Any] = DOCUMENT["components"]["schemas"]
PREDICT: dict[str, Any] = DOCUMENT["paths"]["/predictions/{model}"]["post"]
GATEWAY = yaml.safe_load((ROOT / "deploy/envoy/http.yaml").read_text())["resources"][0]["typed_config"]
PICTURE = SCHEMAS["Picture64"]["examples"][0]


def resolved(values: dict[str, Any]) -> dict[str, Any]:
    """Follow a reference, if it is one."""
    if "$ref" not in values:
        return values
    found: Any = DOCUMENT
    for part in values["$ref"].removeprefix("#/").split("/"):
        found = found[part]
    return dict(found)


def nested(values: Any) -> Iterator[dict[str, Any]]:
    """Yield every object in a value."""
    if isinstance(values, dict):
        yield values
    for item in values.values() if isinstance(values, dict) else values if isinstance(values, list) else ():
        yield from nested(item)


def fields_of(name: str) -> set[str]:
    """Return the properties of a schema, those of its alternatives included."""
    return {field for one in nested(SCHEMAS[name]) for field in one.get("properties", {})}


# ---------------------------------------------------------------- the document itself


def test_it_is_openapi_and_its_schemas_are_json_schema() -> None:
    SCHEMA.validate()
    for schema in SCHEMAS.values():
        jsonschema.Draft202012Validator.check_schema(schema)
    wrong = deepcopy(DOCUMENT)
    wrong["paths"]["/predictions/{model}"]["post"]["parameter"] = []
    with pytest.raises(jsonschema_rs.ValidationError, match="parameter"):
        schemathesis.openapi.from_dict(wrong).validate()


def test_every_component_is_used_and_there() -> None:
    used = {one["$ref"] for one in nested(DOCUMENT) if "$ref" in one}
    there = {f"#/components/{kind}/{name}" for kind, items in DOCUMENT["components"].items() for name in items}
    assert used == {name for name in there if "/securitySchemes/" not in name}


def test_an_id_is_given_once() -> None:
    ids = [one["operationId"] for one in nested(DOCUMENT["paths"]) if "operationId" in one]
    assert len(ids) == len(set(ids)) == sum("responses" in one for one in nested(DOCUMENT["paths"]))


def test_it_is_of_the_version_of_the_messages() -> None:
    assert wire.DESCRIPTOR.package == f"{DOCUMENT['info']['title']}.{DOCUMENT['info']['version']}"


# ---------------------------------------------------------------- paths, methods, formats


def test_the_gateway_lets_these_paths_and_methods_through_and_no_other() -> None:
    [host] = GATEWAY["route_config"]["virtual_hosts"]
    routes = {route["name"]: route["match"] for route in host["routes"]}
    paths, methods = routes["rest"]["safe_regex"]["regex"], routes["rest"]["headers"][0]["string_match"]["safe_regex"]
    for path, item in DOCUMENT["paths"].items():
        if path == routes["openapi"]["path"]:
            continue
        names = {one["$ref"].rpartition("/")[2]: resolved(one) for one in item["parameters"]}
        assert re.findall(r"{(\w+)}", path) == list(names)
        assert all(one["schema"]["pattern"].strip("^$") in paths for one in names.values())
        assert re.fullmatch(paths, re.sub(r"{\w+}", "cifar-1.0_a", path))
        assert not re.fullmatch(paths, re.sub(r"{\w+}", "ci far", path))
        given = {name.upper() for name in item if name != "parameters"}
        assert given == set(methods["regex"].split("|")) - ({"GET"} if "explanations" in path else set())
        for method in set(item) - {"parameters"}:  # So that a host need be asked for one of them alone.
            first = DOCUMENT["paths"]["/predictions/{model}"]["get" if method == "get" else "post"]
            parts = ("parameters", "requestBody", "responses")
            assert [item[method].get(part) for part in parts] == [first.get(part) for part in parts]
    assert len(DOCUMENT["paths"]) == 5


def test_a_response_comes_in_every_format_and_a_card_in_those_it_is_made_in() -> None:
    responses = DOCUMENT["components"]["responses"]
    assert list(responses["Reply"]["content"]) == list(FORMATS)
    assert list(responses["Card"]["content"]) == [JSON, PROTOBUF]


# ---------------------------------------------------------------- errors


def test_codes_are_those_of_the_handlers_the_hosts_and_the_gateway_by_status() -> None:
    expected: dict[str, set[str]] = defaultdict(set)
    for kind in RequestError.__subclasses__():
        expected[str(kind.status)].add(kind.code)
    for code, status in STATUS.items():
        expected[str(status)].add(code)
    for mapper in GATEWAY["local_reply_config"]["mappers"]:
        [*_, found] = re.findall(r"'op': 'EQ', 'value': {'default_value': (\d+)", str(mapper["filter"])) or [""]
        if error := mapper["body_format_override"].get("json_format", {}).get("error"):
            expected[found].add(error["code"])
    expected["502"].add(GATEWAY["local_reply_config"]["body_format"]["json_format"]["error"]["code"])
    for operation in ("get", "post"):
        described = {
            status: {code for one in nested(resolved(response)["content"][JSON]) for code in one.get("enum", ())}
            for status, response in DOCUMENT["paths"]["/predictions/{model}"][operation]["responses"].items()
        }
        assert described.pop("200") == set()
        assert described.pop("507") == set()  # TorchServe's own.
        missing = {"413"} if operation == "get" else set()
        assert described == {status: codes for status, codes in expected.items() if status not in missing}
    assert set(SCHEMAS["Code"]["enum"]) == set().union(*expected.values())
    assert {kind.code for kind in RequestRejected.__subclasses__()} <= set(SCHEMAS["Code"]["enum"])


# ---------------------------------------------------------------- options


def test_every_carrier_has_every_option_and_field() -> None:
    headers = [resolved(one) for one in PREDICT["parameters"]]
    assert [one["name"].lower() for one in headers] == [
        *(f"x-convscope-{name.replace('_', '-')}" for name in OPTION_NAMES),
        "x-request-id",
        *TRACE,
    ]
    for name in ("Form", "Request"):
        assert fields_of(name) == set(SCHEMAS[name]["propertyNames"]["enum"]) == {"data", *FIELDS, *TRACE}


@pytest.mark.parametrize("field", ["data", *FIELDS, *TRACE])
def test_the_handler_knows_a_field_and_no_other_like_it(field: str) -> None:
    headers = {"content-type": JSON}
    for name, is_known in ((field, True), (field + "s", False)):
        job = Job(
            {"body": json.dumps({"data": PICTURE} | {name: PICTURE if name == "data" else None}).encode()}, headers
        )
        if is_known:
            parse(job, max_images=1)
        else:
            with pytest.raises(BadRequest, match="unknown field"):
                parse(job, max_images=1)


def limited() -> Iterator[Any]:
    """Yield every number and list with bounds: where it stands, what reads it, and its schema."""
    for place, read, schema in (
        ("", Options.from_values, SCHEMAS["Request"]["anyOf"][0]),
        ("explain.", Explain.from_value, SCHEMAS["Explain"]),
    ):
        for name, described in schema["properties"].items():
            for one in described.get("anyOf", ()):
                if name != "data" and one.get("type") in ("integer", "array"):
                    yield pytest.param(read, name, one, id=f"{place}{name} {one['type']}")


@pytest.mark.parametrize(("read", "name", "schema"), list(limited()))
def test_the_ends_of_a_range_are_taken_and_what_lies_beyond_is_not(
    read: Any, name: str, schema: dict[str, Any]
) -> None:
    if schema["type"] == "integer":
        good = [schema["minimum"], schema["maximum"]]
        bad = [schema["minimum"] - 1, schema["maximum"] + 1]
    else:
        most, item = schema["maxItems"], "conv1" if schema["items"].get("type") == "string" else 1
        items: list[Any] = [item] * (most + 1)
        if name == "edits":
            items = [{"layer": "conv1", "operation": "zero", "picture": place // 16} for place in range(most + 1)]
        good = [items[: schema.get("minItems", 0)], items[:most]]
        bad = [items] + ([[]] if schema.get("minItems") else [])
    for value in good:
        read({name: value})
    for value in bad:
        with pytest.raises(BadRequest):
            read({name: value})


def test_values_that_are_named_are_those_of_the_code() -> None:
    assert tuple(SCHEMAS["Method"]["enum"]) == METHODS
    assert tuple(SCHEMAS["Explain"]["properties"]["view"]["anyOf"][0]["enum"]) == VIEWS
    assert tuple(SCHEMAS["Tensor"]["properties"]["dtype"]["enum"]) == DTYPES
    assert tuple(resolved(PREDICT["parameters"][2])["schema"]["enum"]) == DTYPES
    assert set(SCHEMAS["Scores"]["enum"]) == {*SCORES, ""}
    assert set(SCHEMAS["Input"]["properties"]["interpolation"]["enum"]) == {*FILTERS, ""}
    assert set(SCHEMAS["Input"]["properties"]["fit"]["enum"]) == {COVER, CONTAIN, ""}
    kinds = {layouts.CHANNELS_FIRST, layouts.CHANNELS_LAST, layouts.PLANE, layouts.VECTOR}
    assert set(SCHEMAS["Layer"]["properties"]["layout"]["enum"]) == kinds | {layouts.TOKENS, layouts.EXTRA_TOKENS}


def test_defaults_are_those_of_the_code() -> None:
    for described, defaults in (
        (SCHEMAS["Request"]["anyOf"][0]["properties"], Options()),
        (SCHEMAS["Explain"]["properties"], Explain()),
    ):
        found = {
            name: one["default"]
            for name, value in described.items()
            for one in map(resolved, value.get("anyOf", ()))
            if "default" in one
        }
        assert found
        for name, value in found.items():
            assert value == (
                getattr(defaults, name) or Explain().method if name == "explain" else getattr(defaults, name)
            )


def test_headers_form_and_json_give_a_value_the_same_type() -> None:
    words = SCHEMAS["Form"]["anyOf"][0]["properties"]
    values = SCHEMAS["Request"]["anyOf"][0]["properties"]
    for name, header in zip(OPTION_NAMES, PREDICT["parameters"], strict=False):
        assert resolved(header)["schema"] == words[name]
        assert resolved(header)["description"] == values[name]["description"]
        if words[name]["type"] != "string" or "enum" in words[name]:
            assert words[name] in values[name]["anyOf"]


# ---------------------------------------------------------------- replies


@pytest.mark.parametrize(
    ("schema", "message", "other"),
    [
        ("ClassScore", wire.ClassScore, set()),
        ("ErrorValues", wire.Error, set()),
        ("Explain", wire.Explain, set()),
        ("Explanation", wire.Explanation, set()),
        ("Input", wire.Input, set()),
        ("Layer", wire.Layer, set()),
        ("Limits", wire.Limits, set()),
        ("ModelCard", wire.ModelCard, set()),
        ("Reply", wire.PredictReply, {"card", "error"}),  # In JSON the card is alone; an error has a status, too.
        ("Result", wire.Result, set()),
        ("Tensor", wire.Tensor, {"channels"}),  # JSON has no FeatureMap around it.
        ("Timing", wire.Timing, set()),
        ("Training", wire.Training, set()),
    ],
)
def test_a_schema_has_the_fields_of_its_message(schema: str, message: Any, other: set[str]) -> None:
    assert fields_of(schema) ^ set(message.DESCRIPTOR.fields_by_name) == other


def test_the_golden_reply_is_as_described_and_one_of_another_type_is_not() -> None:
    validator = jsonschema.Draft202012Validator(
        {"$ref": "#/components/schemas/Reply", "components": DOCUMENT["components"]}
    )
    golden = json.loads((PATH.parent / "examples/reply.json").read_text())
    validator.validate(golden)
    for place in nested(golden):
        if "dtype" in place:
            place["dtype"] = "float64"
    assert not validator.is_valid(golden)
