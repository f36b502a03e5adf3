"""The Open Inference Protocol v2, used by other projects' clients, compared with the handlers run in this process."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub
from tritonclient.utils import InferenceServerException

from handlers.wire import convscope_pb2 as wire
from tests.kserve.conftest import Handle, Host, web
from tests.pictures import colours, npy, png

PICTURES = [png(colours(0)), png(colours(1, 40, 50))]
ARRAYS = np.stack([colours(0), colours(1)])
NPY_FILES = [npy(array) for array in ARRAYS]
DTYPES: dict[int, Any] = {wire.FLOAT32: np.float32, wire.FLOAT16: np.float16, wire.UINT8: np.uint8}

Ask = Any


@pytest.fixture(scope="session")
def handler(handle: Handle) -> Ask:
    """Call the handlers in this process with gRPC's plain keys."""

    def ask(files: list[bytes], **options: str) -> wire.PredictReply:
        row = {"data": files, **{name: text.encode() for name, text in options.items()}}
        return wire.PredictReply.FromString(handle(row, {})[1])

    return ask


@pytest.fixture(scope="module")
def http(host: Host) -> Iterator[Any]:
    with tritonclient.http.InferenceServerClient(host.http) as client:
        yield client


@pytest.fixture(scope="module")
def rpc(host: Host) -> Iterator[Any]:
    with tritonclient.grpc.InferenceServerClient(host.grpc) as client:
        yield client


@pytest.fixture(scope="module")
def stub(host: Host) -> Iterator[Any]:
    with grpc.insecure_channel(host.grpc) as channel:
        yield GRPCInferenceServiceStub(channel)


@pytest.fixture(params=["http", "grpc"])
def triton(request: pytest.FixtureRequest, http: Any, rpc: Any) -> Any:
    """Ask with tritonclient: `triton(tensor, **parameters)`, and `outputs=` to name some."""
    module, client = (tritonclient.http, http) if request.param == "http" else (tritonclient.grpc, rpc)

    def ask(tensor: NDArray[Any], *, outputs: tuple[str, ...] = (), version: str = "", **parameters: Any) -> Any:
        kind = {"uint8": "UINT8", "float32": "FP32"}.get(str(tensor.dtype), "BYTES")
        one = module.InferInput("pictures", list(tensor.shape), kind)
        one.set_data_from_numpy(tensor)
        wanted = [module.InferRequestedOutput(name) for name in outputs] or None
        return client.infer("cifar", [one], model_version=version, outputs=wanted, parameters=parameters or None)

    return ask


def files(*pictures: bytes) -> NDArray[Any]:
    return np.array(pictures, np.object_)


def scores(reply: wire.PredictReply) -> dict[str, NDArray[Any]]:
    """Return a reply's scores as v2 has them."""
    tops = [result.top for result in reply.results]
    return {
        "labels": np.array([[score.label.encode() for score in top] for top in tops], np.object_),
        "indexes": np.array([[score.index for score in top] for top in tops], np.int64),
        "probabilities": np.array([[score.probability for score in top] for top in tops], np.float32),
        "logits": np.array([[score.logit for score in top] for top in tops], np.float32),
    }


def maps(reply: wire.PredictReply) -> dict[str, NDArray[Any]]:
    """Return a reply's maps, and what belongs to them, as v2 has them."""
    found: dict[str, list[NDArray[Any]]] = {}
    for result in reply.results:
        for item in result.maps:
            tensor = item.tensor
            values = {"": np.frombuffer(tensor.data, DTYPES[tensor.dtype]).reshape(tensor.shape)}
            if tensor.scale:
                values |= {".scale": np.float32(tensor.scale), ".offset": np.float32(tensor.offset)}
            if item.channels:
                values[".channels"] = np.array(item.channels, np.int64)
            for suffix, value in values.items():
                found.setdefault(item.layer + suffix, []).append(value)
    return {name: np.stack(values) for name, values in found.items()}


def same(result: Any, expected: dict[str, NDArray[Any]]) -> None:
    """Check that outputs are equal bit for bit, types and shapes included."""
    for name, array in expected.items():
        got = result.as_numpy(name)
        assert (got.dtype, got.shape) == (array.dtype, array.shape), name
        assert np.array_equal(got, array), name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layers": "conv1,conv2", "top_k": "0"},
        {"layers": "all", "map_dtype": "float16", "pool": "4"},
        {"layers": "conv2", "map_dtype": "uint8", "channels": "3"},
    ],
)
def test_files_give_the_handlers_scores_and_maps_bit_for_bit(
    triton: Any, handler: Ask, options: dict[str, str]
) -> None:
    expected = handler(PICTURES, **options)
    result = triton(files(*PICTURES), **options)
    same(result, scores(expected) | maps(expected) | {"errors": files(b"", b"")})


@pytest.mark.parametrize("scale", [1, np.float32(255)])
def test_arrays_are_pictures(triton: Any, handler: Ask, scale: Any) -> None:
    tensor = ARRAYS if scale == 1 else ARRAYS / scale
    expected = handler([npy(array) for array in tensor], layers="conv2", top_k="3")
    same(triton(tensor, layers="conv2", top_k=3), scores(expected) | maps(expected))
    one = handler([npy(tensor[1])], top_k="3")
    same(triton(tensor[1], top_k=3), scores(one))


def test_a_file_may_come_as_a_vector_of_bytes(triton: Any, handler: Ask) -> None:
    same(triton(np.frombuffer(PICTURES[1], np.uint8)), scores(handler(PICTURES[1:])))


def test_a_layer_may_be_asked_for_as_an_output(triton: Any, handler: Ask) -> None:
    result = triton(files(*PICTURES), outputs=("conv2", "probabilities"))
    expected = handler(PICTURES, layers="conv2")
    same(result, maps(expected) | {"probabilities": scores(expected)["probabilities"]})
    assert result.as_numpy("labels") is None
    with pytest.raises(InferenceServerException, match=r"bad_request: there is no output 'conv1.scale'"):
        triton(files(*PICTURES), outputs=("conv1.scale",))


def test_a_damaged_picture_has_an_error_and_costs_its_neighbours_nothing(triton: Any, handler: Ask) -> None:
    result = triton(files(PICTURES[0], b"no picture", PICTURES[1]), layers="conv1", map_dtype="uint8")
    expected = handler([PICTURES[0], b"no picture", PICTURES[1]], layers="conv1", map_dtype="uint8")
    del expected.results[1]
    good = scores(expected) | maps(expected)
    for name, array in good.items():
        assert np.array_equal(result.as_numpy(name)[[0, 2]], array), name
    errors = result.as_numpy("errors")
    assert (errors[0], errors[2]) == (b"", b"")
    assert errors[1].startswith(b"bad_image: ")
    for name in ("probabilities", "logits", "conv1.scale", "conv1.offset"):
        assert np.isnan(result.as_numpy(name)[1]).all(), name
    assert (result.as_numpy("indexes")[1] == -1).all()


def test_an_explanation_is_one_more_output(triton: Any, handler: Ask) -> None:
    result = triton(files(*PICTURES), explain="occlusion,window=16,step=16")
    expected = [item.explanation.heat for item in handler(PICTURES, explain="occlusion,window=16,step=16").results]
    heat = [np.frombuffer(tensor.data, np.float32).reshape(tensor.shape) for tensor in expected]
    same(result, {"explanation.heat": np.stack(heat)})


def test_json_alone_will_do(host: Host, handler: Ask) -> None:
    data = [base64.b64encode(picture).decode() for picture in PICTURES]
    body: dict[str, Any] = {
        "id": "an id of any form",
        "inputs": [{"name": "pictures", "datatype": "BYTES", "shape": [2], "data": data}],
        "parameters": {"top_k": 2, "layers": "conv2", "pool": 1, "timing": True},
    }
    response = web.post(f"http://{host.http}/v2/models/cifar/infer", json=body)
    expected = handler(PICTURES, top_k="2", layers="conv2", pool="1")
    values = response.json()
    outputs = {output["name"]: np.array(output["data"]).reshape(output["shape"]) for output in values["outputs"]}
    assert (response.status_code, values["id"], values["model_version"]) == (200, body["id"], "1.0")
    assert "forward_s=" in values["parameters"]["timing"]
    assert np.array_equal(np.float32(outputs["conv2"]), maps(expected)["conv2"])
    assert np.array_equal(np.float32(outputs["logits"]), scores(expected)["logits"])
    body["parameters"] = {"layers": "conv2", "map_dtype": "float16"}
    response = web.post(f"http://{host.http}/v2/models/cifar/infer", json=body)
    assert response.status_code == 400  # JSON has no FP16; as binary data it comes.
    body["parameters"]["binary_data_output"] = True
    response = web.post(f"http://{host.http}/v2/models/cifar/infer", json=body)
    cells = maps(handler(PICTURES, layers="conv2", map_dtype="float16"))["conv2"]
    assert response.content.endswith(cells.tobytes())


KSERVE = """
    import asyncio, json, sys
    sys.modules["kubernetes_validate"] = None  # See server/kserve/__main__.py.
    import numpy
    from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest, RESTConfig

    pictures, http, grpc = numpy.load(sys.argv[1]), *sys.argv[2:]
    tensor = InferInput("pictures", list(pictures.shape), "UINT8")
    tensor.set_data_from_numpy(pictures)
    request = InferRequest("cifar", [tensor], parameters={"top_k": 3})

    async def main():
        rest, rpc = InferenceRESTClient(RESTConfig(protocol="v2")), InferenceGRPCClient(grpc)
        assert await rest.is_server_ready(http) and await rest.is_model_ready(http, "cifar")
        assert await rpc.is_server_ready() and await rpc.is_model_ready("cifar")
        results = await rest.infer(http, request, model_name="cifar"), await rpc.infer(request)
        await rest.close()
        await rpc.close()
        return [result.get_output_by_name("logits").as_numpy().astype("float32").tolist() for result in results]

    print(json.dumps(asyncio.run(main())))
"""


def test_kserves_own_clients(host: Host, handler: Ask, tmp_path: Path) -> None:
    """In a process of their own: KServe and tritonclient both claim the protocol's names in protobuf."""
    np.save(tmp_path / "pictures.npy", ARRAYS)
    command = [sys.executable, "-c", dedent(KSERVE), str(tmp_path / "pictures.npy"), f"http://{host.http}", host.grpc]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
    expected = scores(handler(NPY_FILES, top_k="3"))["logits"]
    for logits in json.loads(said.stdout):
        assert np.array_equal(np.float32(logits), expected)


def test_metadata_is_true(http: Any, rpc: Any, host: Host) -> None:
    http_metadata, grpc_metadata = http.get_model_metadata("cifar"), rpc.get_model_metadata("cifar", as_json=True)
    outputs = {output["name"]: (output["datatype"], output["shape"]) for output in http_metadata["outputs"]}
    assert http_metadata["inputs"] == [{"name": "pictures", "datatype": "BYTES", "shape": [-1]}]
    assert outputs["conv2"] == ("FP32", [-1, 32, 16, 16])
    assert outputs["labels"] == ("BYTES", [-1, -1])
    assert {output["name"]: [int(size) for size in output["shape"]] for output in grpc_metadata["outputs"]} == {
        name: shape for name, (_, shape) in outputs.items()
    }
    assert http.get_model_metadata("obedient")["versions"] == ["1.10", "1.9"]
    assert http.get_server_metadata()["name"] == "convscope"
    models = web.get(f"http://{host.http}/v2/models").json()
    assert models == {"models": ["cifar", "digits", "obedient"]}


def test_versions_are_told_apart(http: Any, rpc: Any, triton: Any, handler: Ask) -> None:
    same(triton(files(*PICTURES), version="1.0"), scores(handler(PICTURES)))
    assert http.is_model_ready("cifar", "1.0")
    assert rpc.is_model_ready("cifar", "1.0")
    assert not http.is_model_ready("cifar", "2.0")
    with pytest.raises(InferenceServerException, match=r"model_not_found: Model version: 2\.0"):
        triton(files(*PICTURES), version="2.0")


def test_health_and_reflection(host: Host) -> None:
    with grpc.insecure_channel(host.grpc) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "inference.GRPCInferenceService"):
            state = health.Check(health_pb2.HealthCheckRequest(service=service)).status
            assert state == health_pb2.HealthCheckResponse.SERVING
        reflected = ProtoReflectionDescriptorDatabase(channel)
        assert {
            "grpc.health.v1.Health",
            "inference.GRPCInferenceService",
            "org.pytorch.serve.grpc.inference.InferenceAPIsService",
        } <= set(reflected.get_services())
        file = reflected.FindFileContainingSymbol("org.pytorch.serve.grpc.inference.PredictionsRequest")
        assert [service.name for service in file.service] == ["InferenceAPIsService"]


GOOD = {"name": "pictures", "datatype": "UINT8", "shape": [32, 32, 3], "data": [0] * 3072}
WRONG: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "bad_request"),
    "no object": ([], "bad_request"),
    "nothing": ({}, "bad_request"),
    "deep": ("[" * 100_000, "bad_request"),
    "no inputs": ({"inputs": []}, "bad_request"),
    "inputs of text": ({"inputs": ["a"]}, "bad_request"),
    "two inputs": ({"inputs": [GOOD, GOOD]}, "bad_request"),
    "unknown field": ({"inputs": [GOOD], "layers": "conv1"}, "bad_request"),
    "another name": ({"inputs": [{**GOOD, "name": "images"}]}, "bad_request"),
    "another type": ({"inputs": [{**GOOD, "datatype": "FP64"}]}, "bad_request"),
    "type of no text": ({"inputs": [{**GOOD, "datatype": [1]}]}, "bad_request"),
    "no data": ({"inputs": [{key: GOOD[key] for key in ("name", "datatype", "shape")}]}, "bad_request"),
    "negative shape": ({"inputs": [{**GOOD, "shape": [-1, 32, 3]}]}, "bad_request"),
    "shape of text": ({"inputs": [{**GOOD, "shape": ["32", 32, 3]}]}, "bad_request"),
    "shape too large": ({"inputs": [{**GOOD, "shape": [2**31, 2**31, 2**31]}]}, "bad_request"),
    "shape not filled": ({"inputs": [{**GOOD, "shape": [33, 32, 3]}]}, "bad_request"),
    "too large a number": ({"inputs": [{**GOOD, "data": [256] * 3072}]}, "bad_request"),
    "huge number": ({"inputs": [{**GOOD, "data": [10**30] * 3072}]}, "bad_request"),
    "fraction": ({"inputs": [{**GOOD, "data": [1.5] * 3072}]}, "bad_request"),
    "text": ({"inputs": [{**GOOD, "data": ["a"] * 3072}]}, "bad_request"),
    "ragged": ({"inputs": [{**GOOD, "data": [[1], [1, 2]]}]}, "bad_request"),
    "no base64": (
        {"inputs": [{"name": "pictures", "datatype": "BYTES", "shape": [1], "data": ["é"]}]},
        "bad_request",
    ),
    "more than said": (
        {"inputs": [{"name": "pictures", "datatype": "BYTES", "shape": [1], "data": ["", ""]}]},
        "bad_request",
    ),
    "no picture": ({"inputs": [{"name": "pictures", "datatype": "BYTES", "shape": [0], "data": []}]}, "bad_request"),
    "too many": ({"inputs": [{**GOOD, "shape": [65, 1, 1, 3], "data": [0] * 195}]}, "too_many_images"),
    "wrong channels": ({"inputs": [{**GOOD, "shape": [32, 96, 1]}]}, "wrong_channels"),
    "no file": ({"inputs": [{**GOOD, "shape": [3], "data": [1, 2, 3]}]}, "bad_image"),
    "half a character": ({"id": "\ud800", "inputs": [GOOD]}, "bad_request"),
    "half a letter": ({"inputs": [GOOD], "parameters": {"layers": "\ud800"}}, "bad_request"),
    "unknown option": ({"inputs": [GOOD], "parameters": {"layer": "conv1"}}, "bad_request"),
    "reserved word": ({"inputs": [GOOD], "parameters": {"accept": "image/png"}}, "bad_request"),
    "option of no kind": ({"inputs": [GOOD], "parameters": {"layers": ["conv1"]}}, "bad_request"),
    "wrong option": ({"inputs": [GOOD], "parameters": {"top_k": -1}}, "bad_request"),
    "unknown layer": ({"inputs": [GOOD], "parameters": {"layers": "zzz"}}, "unknown_layer"),
    "unknown output": ({"inputs": [GOOD], "outputs": [{"name": "zzz"}]}, "unknown_layer"),
    "outputs of text": ({"inputs": [GOOD], "outputs": "logits"}, "bad_request"),
    "size of no data": ({"inputs": [{**GOOD, "parameters": {"binary_data_size": 3072}}]}, "bad_request"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_over_rest_is_said_with_a_code(host: Host, case: str) -> None:
    values, code = WRONG[case]
    body = values if isinstance(values, str) else json.dumps(values)
    response = web.post(f"http://{host.http}/v2/models/cifar/infer", content=body)
    assert (response.status_code, response.json()["code"]) == (413 if code == "too_many_images" else 400, code)
    assert response.json()["error"].startswith(f"{code}: ")


@pytest.mark.parametrize("length", ["-1", "1e3", "99999999", "0x5", ""])
def test_a_wrong_length_of_the_json_is_rejected(host: Host, length: str) -> None:
    headers = {"Inference-Header-Content-Length": length}
    response = web.post(f"http://{host.http}/v2/models/cifar/infer", content=b"{}", headers=headers)
    assert (response.status_code, response.json()["code"]) == (400, "bad_request")


def bytes_tensor(*items: bytes) -> bytes:
    return b"".join(len(item).to_bytes(4, "little") + item for item in items)


@pytest.mark.parametrize(
    ("datatype", "shape", "raw", "code"),
    [
        ("BYTES", [1], [b"\xff\xff\xff\xff"], "bad_request"),
        ("BYTES", [1], [b"\x01"], "bad_request"),
        ("BYTES", [2], [bytes_tensor(b"a")], "bad_request"),
        ("BYTES", [1], [bytes_tensor(b"a", b"b")], "bad_request"),
        ("BYTES", [2**31], [b""], "bad_request"),
        ("BYTES", [2**30], [b""], "too_many_images"),
        ("BYTES", [1], [bytes_tensor(b"a"), bytes_tensor(b"a")], "bad_request"),
        ("BYTES", [1], [bytes_tensor(b"a")], "bad_image"),
        ("BYTES", [1], [], "bad_request"),
        ("UINT8", [2, 2, 3], [b"\0" * 11], "bad_request"),
        ("UINT8", [2, 2, 3], [b"\0" * 12], None),
        ("UINT8", [0, 2, 3], [b""], "bad_image"),
        ("FP32", [2, 2, 3], [b"\xff" * 48], "bad_image"),
        ("FP32", [12], [b"\0" * 48], "bad_request"),
        ("INT8", [2, 2, 3], [b"\0" * 12], "bad_request"),
        ("", [], [b""], "bad_request"),
    ],
)
def test_what_is_wrong_over_grpc_is_said_with_a_code(
    stub: Any, datatype: str, shape: list[int], raw: list[bytes], code: str | None
) -> None:
    tensor = pb.ModelInferRequest.InferInputTensor(name="pictures", datatype=datatype, shape=shape)
    request = pb.ModelInferRequest(model_name="cifar", inputs=[tensor], raw_input_contents=raw)
    if code is None:
        assert len(stub.ModelInfer(request).outputs) == 5
        return
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(request)
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert dict(error.trailing_metadata())["convscope-code"] == code
    assert error.details().startswith(f"{code}: ")


def test_contents_will_do_over_grpc(stub: Any, handler: Ask) -> None:
    tensor = pb.ModelInferRequest.InferInputTensor(name="pictures", datatype="UINT8", shape=ARRAYS.shape)
    tensor.contents.uint_contents.extend(ARRAYS.ravel().tolist())
    response = stub.ModelInfer(pb.ModelInferRequest(model_name="cifar", id="7", inputs=[tensor]))
    place = [output.name for output in response.outputs].index("logits")
    assert response.id == "7"
    assert response.raw_output_contents[place] == scores(handler(NPY_FILES))["logits"].tobytes()
    tensor.contents.uint_contents[0] = 256
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(pb.ModelInferRequest(model_name="cifar", inputs=[tensor]))
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_nothing_loads_or_unloads_a_model(host: Host, stub: Any, http: Any) -> None:
    for verb in ("load", "unload"):
        assert web.post(f"http://{host.http}/v2/repository/models/cifar/{verb}").status_code == 404
    for call, request in (
        (stub.RepositoryModelUnload, pb.RepositoryModelUnloadRequest(model_name="cifar")),
        (stub.RepositoryModelLoad, pb.RepositoryModelLoadRequest(model_name="cifar")),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            call(request)
        error: Any = caught.value
        assert error.code() is grpc.StatusCode.UNIMPLEMENTED
    assert http.is_model_ready("cifar")


def test_how_pictures_were_converted_is_a_parameter(triton: Any) -> None:
    response = triton(files(*PICTURES, png(colours()[:, :, 0]))).get_response()
    said = response["parameters"] if isinstance(response, dict) else response.parameters
    notes = said["notes"] if isinstance(response, dict) else said["notes"].string_param
    assert notes == "1: aspect ratio changed; 2: grey to RGB"
    response = triton(files(PICTURES[0])).get_response()
    assert "notes" not in (response["parameters"] if isinstance(response, dict) else response.parameters)


def test_edits_and_what_they_change_are_outputs_too(triton: Any, handler: Ask) -> None:
    edits = '[{"layer": "conv1", "channels": [0, 1], "operation": "scale", "value": 3}]'
    options = {"edits": edits, "compare": "true", "layers": "conv2", "top_k": "0"}
    result, expected = triton(files(*PICTURES), **options), handler(PICTURES, **options)
    changes = [item.change for item in expected.results]
    logits = np.float32([[score.logit for score in change.top] for change in changes])
    differences = [np.frombuffer(change.maps[0].tensor.data, np.float32).reshape(32, 16, 16) for change in changes]
    assert np.stack(differences).any()
    same(result, {"change.logits": logits, "change.conv2": np.stack(differences), **maps(expected)})
    some = triton(files(*PICTURES), edits=edits, compare=True, outputs=("change.conv2", "change.labels"))
    same(some, {"change.conv2": np.stack(differences)})
    assert some.as_numpy("conv2") is None
    with pytest.raises(InferenceServerException, match="there is no layer"):
        triton(files(*PICTURES), edits='[{"layer": "nose", "operation": "zero"}]')
