"""The local server of `convscope ui`: which requests it accepts."""

from __future__ import annotations

import io
import json
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from convscope import AuthenticationFailed, Client, ModelNotFound
from convscope_lens._page import server as page_server
from convscope_lens._page.page_data import fetch_page_data
from convscope_lens._page.server import MAX_BODY_BYTES, PageServer, accepted_hosts, http_status
from PIL import Image

from tests.client.stand_in import RELOADED, StandIn, fetch_maps, run_network, serve
from tests.page.service import make_picture

API_KEY = "very-secret-key"


@pytest.fixture(scope="module")
def stand_in() -> Iterator[StandIn]:
    with serve() as running:
        yield running


@pytest.fixture(scope="module")
def server(stand_in: StandIn) -> Iterator[PageServer]:
    with Client(stand_in.rest_url, api_key=API_KEY) as client, PageServer(client, ["cifar", "digits"]) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def http(server: PageServer) -> Iterator[httpx.Client]:
    headers = {"x-convscope-token": token(server)}
    with httpx.Client(base_url=f"http://{hosts(server)[0]}", headers=headers, trust_env=False, timeout=30) as http:
        yield http


def token(server: PageServer) -> str:
    return server.url.partition("#")[2]


def address(server: PageServer) -> tuple[str, int]:
    parts = urlsplit(server.url)
    assert parts.hostname
    assert parts.port
    return parts.hostname, parts.port


def hosts(server: PageServer) -> list[str]:
    """The accepted host names."""
    return [f"{name}:{address(server)[1]}" for name in ("127.0.0.1", "localhost")]


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def add(http: httpx.Client, picture: bytes | None = None, title: str = "cat.png") -> str:
    """Send a picture, and return its id."""
    response = http.post("/pictures", params={"title": title}, content=make_picture() if picture is None else picture)
    assert response.status_code == 200
    picture_id: str = response.json()["id"]
    return picture_id


def ask(http: httpx.Client, picture: str, model: str = "cifar", path: str = "predict", **query: Any) -> httpx.Response:
    return http.get(f"/{path}", params={"model": model, "picture": picture, **query})


def test_it_listens_on_this_machine_alone(server: PageServer):
    assert address(server)[0] == "127.0.0.1"


def test_the_page_holds_no_secret_and_may_not_be_framed(server: PageServer, http: httpx.Client):
    response = http.get("/", headers={"x-convscope-token": ""})
    assert response.status_code == 200
    text = response.text + str(response.headers)
    assert token(server) not in text
    assert API_KEY not in text
    assert "frame-ancestors 'none'" in response.headers["content-security-policy"]
    assert "connect-src 'self'" in response.headers["content-security-policy"]
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["cache-control"] == "no-store"


def test_a_picture_is_answered_with_page_data_and_the_service_gets_the_key(stand_in: StandIn, http: httpx.Client):
    stand_in.keys.clear()
    response = ask(http, add(http, title="a&b"), "digits")
    assert response.status_code == 200
    assert (response.json()["title"], response.json()["model"]["name"]) == ("a&b", "digits")
    assert set(stand_in.keys) == {API_KEY}


def test_what_the_client_and_the_service_did_to_a_picture_is_in_the_page_data(http: httpx.Client):
    frames, file = [Image.new("RGB", (4, 5), colour) for colour in ("red", "blue")], io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    pictures = (file.getvalue(), b"grey picture", make_picture())
    notes = [ask(http, add(http, picture)).json()["notes"] for picture in pictures]
    assert notes == [["first frame only"], ["grey to RGB", "cropped"], []]


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1", ""])
def test_a_foreign_name_that_leads_here_is_not_answered(host: str, http: httpx.Client):
    assert code(http.get("/", headers={"host": host})) == (403, "forbidden")
    assert code(http.post("/pictures", content=b"x", headers={"host": host})) == (403, "forbidden")
    assert code(http.get("/predict?model=cifar", headers={"host": host})) == (403, "forbidden")


@pytest.mark.parametrize("headers", [{"x-convscope-token": ""}, {"x-convscope-token": "wrong"}])
def test_without_the_key_nothing_is_asked(headers: dict[str, str], stand_in: StandIn, http: httpx.Client):
    picture = add(http)
    stand_in.requests.clear()
    for path in ("predict", "map", "filters", "pictures"):
        query = {"model": "cifar", "picture": picture, "layer": "conv1"}
        assert code(http.get(f"/{path}", params=query, headers=headers)) == (403, "forbidden")
    assert code(http.post("/pictures", content=make_picture(), headers=headers)) == (403, "forbidden")
    assert not stand_in.requests


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1"])
def test_another_page_may_not_ask(origin: str, http: httpx.Client):
    response = http.post("/pictures", content=make_picture(), headers={"origin": origin})
    assert code(response) == (403, "forbidden")
    assert "access-control-allow-origin" not in response.headers


def test_the_page_itself_may_ask_by_either_name(server: PageServer, http: httpx.Client):
    for host in hosts(server):
        headers = {"host": host, "origin": f"http://{host}"}
        assert http.post("/pictures", content=make_picture(), headers=headers).status_code == 200


def test_a_large_body_is_rejected_unread(server: PageServer):
    with socket.create_connection(address(server), timeout=30) as connection:
        head = f"POST /pictures HTTP/1.1\r\nhost: {hosts(server)[0]}\r\nx-convscope-token: {token(server)}\r\n"
        connection.sendall(f"{head}content-length: {MAX_BODY_BYTES + 1}\r\n\r\n".encode())
        response = b"".join(iter(lambda: connection.recv(65536), b""))
    assert response.startswith(b"HTTP/1.1 413")
    assert b"image_too_large" in response


def test_a_body_of_unknown_length_is_rejected(http: httpx.Client):
    response = http.post("/pictures", content=iter([b"abc"]))
    assert code(response) == (411, "bad_request")


def test_errors_of_the_service_come_with_their_code(http: httpx.Client):
    picture = add(http)
    assert code(ask(http, add(http, b"bad picture"))) == (400, "bad_image")
    assert code(ask(http, picture, "other")) == (404, "model_not_found")
    assert code(ask(http, "elsewhere")) == (404, "picture_not_found")
    assert code(ask(http, picture, top_k="many")) == (400, "bad_request")
    assert code(ask(http, picture, path="map", layer="conv9")) == (400, "unknown_layer")
    assert code(ask(http, picture, path="filters", layer="conv1", channel=9)) == (400, "bad_request")
    assert code(http.post("/elsewhere", content=b"x")) == (404, "not_found")
    assert code(http.get("/../secret")) == (404, "not_found")


def test_what_is_no_fault_of_the_pictures_is_told_as_such(stand_in: StandIn, http: httpx.Client):
    picture = add(http)
    stand_in.mishaps[:] = ["died", "died"]  # A worker that died is asked again, once.
    assert code(ask(http, picture)) == (502, "internal")
    assert http_status(AuthenticationFailed()) == 502


def test_on_port_80_names_without_a_port_are_accepted():
    assert set(accepted_hosts(80)) == {"127.0.0.1:80", "localhost:80", "127.0.0.1", "localhost"}
    assert set(accepted_hosts(81)) == {"127.0.0.1:81", "localhost:81"}


def test_a_model_that_is_not_there_is_told_at_the_start(stand_in: StandIn):
    with Client(stand_in.rest_url) as client:
        with pytest.raises(ModelNotFound):
            PageServer(client, ["cifar", "missing"])
        with pytest.raises(ValueError, match="must not be empty"):
            PageServer(client, [])


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_until_it_is_stopped(stop: signal.Signals, stand_in: StandIn):
    arguments = ["ui", "--model", "cifar,digits", "--url", stand_in.rest_url, "--json"]
    process: Any
    with subprocess.Popen([sys.executable, "-m", "convscope", *arguments], stdout=subprocess.PIPE) as process:
        try:
            url = json.loads(process.stdout.readline())["url"]
            page = httpx.get(url, trust_env=False, timeout=30)
            assert page.status_code == 200
            assert "cifar" in page.text
        finally:
            process.send_signal(stop)
            try:
                status = process.wait(30)
            finally:
                process.kill()
        assert status == 0


def test_options_of_an_explanation_and_the_number_of_scores_reach_the_service(stand_in: StandIn, http: httpx.Client):
    picture = add(http)
    response = ask(http, picture, method="grad_cam", layer="conv2", target=7, top_k=2).json()
    assert (response["heat"]["layer"], response["heat"]["target"], len(response["scores"])) == ("conv2", 7, 2)
    assert ask(http, picture, method="none").json()["heat"] is None


def test_a_whole_map_comes_as_an_array_and_so_do_kernels(http: httpx.Client):
    picture = make_picture()
    loaded = [
        np.load(io.BytesIO(ask(http, add(http, picture), path="map", layer="conv1", **channel).content))
        for channel in ({}, {"channel": 2})
    ]
    expected = fetch_maps(picture, (4, 6, 5))
    assert np.array_equal(loaded[0], expected)
    assert np.array_equal(loaded[1], expected[2])
    kernels = ask(http, "", path="filters", layer="conv1", channel=1).json()
    assert (kernels["channels"], kernels["shape"]) == ([1], [3, 3, 3])


def test_pictures_are_kept_under_ids_of_their_bytes_and_a_drawing_replaces_the_one_before(http: httpx.Client):
    first, second = add(http, make_picture(), "one.png"), add(http, make_picture() + b"\0", "two.png")
    assert add(http, make_picture(), "again.png") == first != second
    kept = {one["id"]: one for one in http.get("/pictures").json()}
    assert (kept[first]["title"], kept[second]["title"]) == ("again.png", "two.png")
    assert kept[first]["thumbnail"].startswith("data:image/png;base64,")
    third = http.post(
        "/pictures", params={"title": "drawing", "replaces": second}, content=make_picture() + b"\1"
    ).json()
    ids = [one["id"] for one in http.get("/pictures").json()]
    assert third["id"] in ids
    assert second not in ids


def test_samples_can_be_asked_about(http: httpx.Client):
    [settings] = re.findall(r'id="settings">(.*?)</script>', http.get("/").text, re.DOTALL)
    samples = json.loads(settings)["samples"]
    assert [sample["title"] for sample in samples][:2] == ["cat.png", "frog.png"]
    assert ask(http, samples[0]["id"]).json()["title"] == "cat.png"


OFF = {"layer": "conv1", "channels": [2], "operation": "zero"}


def test_edits_come_with_what_they_change(stand_in: StandIn, http: httpx.Client):
    picture = add(http)
    data = ask(http, picture, edits=json.dumps([OFF]), method="grad_cam", target=3, top_k=2).json()
    [edit] = stand_in.requests[-1][2].edits
    (logits, maps), (before, maps_before) = run_network(make_picture(), [edit]), run_network(make_picture())
    assert data["edits"] == 1
    assert (data["heat"], "without edits" in data["heat_note"]) == (None, True)
    for score in data["scores"]:
        index = score["index"]
        assert score["change"]["logit"] == pytest.approx(logits[index] - before[index], abs=1e-4)
    assert {score["index"] for score in (*data["scores"], *data["gone"])} >= {*np.argsort(-before)[:2].tolist()}
    conv1, conv2 = data["layers"]
    assert conv1["channels"] == np.argsort(-maps_before["conv1"].mean(axis=(1, 2))).tolist()  # As without edits.
    changed = dict(zip(conv1["channels"], conv1["change"], strict=True))
    assert [channel for channel, change in changed.items() if change] == [2]
    strongest = np.abs(maps_before["conv1"][2]).argmax()
    assert changed[2] == pytest.approx(-maps_before["conv1"][2].flat[strongest], abs=0.01)
    assert conv1["before"][conv1["channels"].index(2)] == pytest.approx(
        [maps_before["conv1"][2].min(), maps_before["conv1"][2].max()], abs=0.02
    )
    assert conv2["change"] == pytest.approx([float((maps["conv2"] - maps_before["conv2"]).flat[0])] * 3, abs=1e-4)
    exact = np.load(io.BytesIO(ask(http, picture, path="map", layer="conv1", edits=json.dumps([OFF])).content))
    assert np.array_equal(exact, maps["conv1"])
    assert "change" not in ask(http, picture).json()["scores"][0]


@pytest.mark.parametrize(
    ("edits", "code_", "words"),
    [
        ("zero", "bad_request", "edits is not JSON"),
        ("{}", "bad_request", "edits must be a list of operations"),
        ("[1]", "bad_request", "edits[0] must be an Edit or a dict"),
        ('[{"layer": "conv1", "operation": "scale", "value": "x"}]', "bad_request", "edits[0].value must be"),
        ('[{"layer": "nose", "operation": "zero"}]', "unknown_layer", "edits[0]: no layer 'nose'; there are: conv1"),
    ],
)
def test_edits_that_are_none_are_rejected(http: httpx.Client, edits: str, code_: str, words: str):
    for path in ("predict", "map"):
        response = ask(http, add(http), path=path, layer="conv1", method="grad_cam", edits=edits)
        assert code(response) == (400, code_)
        assert words in response.json()["error"]["message"]


def test_an_edited_channel_is_shown_even_if_it_is_not_among_the_strongest_any_more(stand_in: StandIn):
    with Client(stand_in.rest_url) as client:
        card = client.model_card("cifar")
        options: dict[str, Any] = {"model": "cifar", "title": "", "max_values": 90, "method": None}
        plain = fetch_page_data(client, make_picture(), card, **options)
        strongest, *others = plain["layers"][0]["channels"]
        assert len(others) < 3
        turn = {"layer": "conv1", "channels": [strongest], "operation": "scale", "value": -9}
        edited = fetch_page_data(client, make_picture(), card, **options, edits=[turn])["layers"][0]
    assert edited["channels"][0] == strongest
    assert edited["min"][0] == pytest.approx(-9 * plain["layers"][0]["max"][0], rel=1e-4)
    assert len(edited["channels"]) == len(others) + 2


def test_after_a_reload_the_card_is_the_new_ones(
    stand_in: StandIn, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
):
    def described() -> str:
        [card] = [one for one in http.get("/models").json() if one["name"] == "cifar"]
        return str(card["description"])

    picture = add(http)
    assert (ask(http, picture).json()["model"]["description"], described()) == ("stands in", "stands in")
    monkeypatch.setattr(page_server, "CARD_S", 1e6)  # Nothing but the version that answers tells of the reload.
    stand_in.newest = RELOADED
    try:
        data = ask(http, picture).json()
        assert (data["model"]["version"], data["model"]["description"]) == (RELOADED, "stands in, reloaded")
        assert described() == "stands in, reloaded"
        stand_in.newest = "1.0"
        monkeypatch.setattr(page_server, "CARD_S", 0)  # The page asks for cards before it asks about a picture.
        assert described() == "stands in"
    finally:
        stand_in.newest = "1.0"
