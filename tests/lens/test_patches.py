"""Patches: what a cell depends on, the cells where a channel is strongest, and `convscope strongest`."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from convscope import BadImage, Client, ConvscopeError, Layer, UnknownLayer
from convscope._cli import main
from convscope_lens import Patch, cut_patch, strongest_patches
from PIL import Image

from tests.client.stand_in import StandIn, fetch_maps

LAYER = Layer("conv2", "conv2", (4, 5, 5), (2, 2), (5, 5), (-2, -2), 1, {})


class TestPatch:
    PICTURE = np.arange(3 * 12 * 10, dtype=np.float32).reshape(3, 12, 10) / 360

    def test_is_what_the_cell_depends_on(self) -> None:
        patch = cut_patch(self.PICTURE, LAYER, (2, 3))
        assert patch.box == (2, 4, 7, 9)
        assert np.array_equal(patch.pixels, self.PICTURE[:, 2:7, 4:9].transpose(1, 2, 0))

    def test_ends_at_the_border_while_its_box_goes_on(self) -> None:
        patch = cut_patch(self.PICTURE, LAYER, (0, 5))
        assert patch.box == (-2, 8, 3, 13)
        assert np.array_equal(patch.pixels, self.PICTURE[:, 0:3, 8:10].transpose(1, 2, 0))

    @pytest.mark.parametrize("cell", [(-1, 0), (7, 0), (0, 9)])
    def test_of_a_cell_that_is_not_there_is_rejected(self, cell: tuple[int, int]) -> None:
        with pytest.raises(ValueError, match="no cell"):
            cut_patch(self.PICTURE, LAYER, cell)

    def test_of_a_layer_of_unknown_geometry_is_rejected(self) -> None:
        unknown = Layer("fc", "fc", (10,), None, None, None, 1, {})
        with pytest.raises(ValueError, match="does not state the receptive field"):
            cut_patch(self.PICTURE, unknown, (0, 0))

    def test_can_be_looked_at(self) -> None:
        image = cut_patch(self.PICTURE, LAYER, (2, 3)).display_pixels()
        assert (image.shape, image.dtype) == ((260, 260, 3), np.uint8)


class TestStrongest:
    PICTURES = (b"one", b"two", b"three", b"four")

    def test_cells_come_in_falling_order_with_their_pictures(self, client: Client) -> None:
        result = strongest_patches(client, self.PICTURES, model="cifar", layer="conv1", channel=1, n=5, per_picture=2)
        maps = [fetch_maps(picture, (4, 6, 5))[1] for picture in self.PICTURES]
        best = [(value, number) for number, cells in enumerate(maps) for value in np.sort(cells, axis=None)[-2:]]
        assert [(patch.value, patch.picture_index) for patch in result] == sorted(best, reverse=True)[:5]
        for patch in result:
            assert maps[patch.picture_index][patch.cell] == patch.value
            assert patch.box == (patch.cell[0] - 1, patch.cell[1] - 1, patch.cell[0] + 2, patch.cell[1] + 2)
            assert (patch.layer, patch.channel) == ("conv1", 1)

    def test_one_of_a_picture_at_most_unless_said_otherwise(self, client: Client) -> None:
        result = strongest_patches(client, self.PICTURES, model="cifar", layer="conv1", channel=0)
        assert sorted(patch.picture_index for patch in result) == [0, 1, 2, 3]

    def test_requests_are_as_large_as_their_replies_may_be(
        self, stand_in: StandIn, client: Client, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The maps of all pictures fit into a reply of 20,000 bytes, but only one input of 32×32."""
        card = client.model_card("cifar")
        card = dataclasses.replace(card, limits=dataclasses.replace(card.limits, max_reply_bytes=20_000))
        monkeypatch.setattr(client, "model_card", lambda *_, **__: card)
        strongest_patches(client, self.PICTURES, model="cifar", layer="conv1", channel=0, n=2)
        sizes = [len(request.pictures) for *_, request in stand_in.requests if not request.describe]
        assert sizes == [4, 1, 1]

    def test_a_picture_that_fails_can_be_left_out(self, client: Client) -> None:
        errors: dict[int, ConvscopeError] = {}
        options = {"model": "cifar", "layer": "conv1", "channel": 0}
        result = strongest_patches(client, [b"one", b"bad", b"two"], **options, on_error=errors.__setitem__)
        assert {patch.picture_index for patch in result} == {0, 2}
        assert [(number, type(error)) for number, error in errors.items()] == [(1, BadImage)]

    def test_pictures_are_read_in_batches(self, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
        """Only the pictures of one batch, and those with a strongest cell, are in memory."""
        card = client.model_card("cifar")
        card = dataclasses.replace(card, limits=dataclasses.replace(card.limits, max_images=2))
        monkeypatch.setattr(client, "model_card", lambda *_, **__: card)
        read: list[int] = []
        sent: list[int] = []
        predict = client.predict

        def pictures() -> Iterator[bytes]:
            for index in range(6):
                read.append(index)
                yield str(index).encode()

        def counted(files: list[bytes], **options: Any) -> Any:
            sent.append(len(read))
            return predict(files, **options)

        monkeypatch.setattr(client, "predict", counted)
        result = strongest_patches(client, pictures(), model="cifar", layer="conv1", channel=0, n=3)
        assert sent == [2, 4, 6]
        best = sorted((fetch_maps(str(index).encode(), (4, 6, 5))[0].max(), index) for index in range(6))[:-4:-1]
        assert [(patch.value, patch.picture_index) for patch in result] == best

    @pytest.mark.parametrize("picture", ["cat.png", b"cat"])
    def test_a_single_picture_is_a_type_error(self, client: Client, picture: Any) -> None:
        with pytest.raises(TypeError, match="iterable of pictures"):
            strongest_patches(client, picture, model="cifar", layer="conv1", channel=0)

    def test_no_pictures_have_no_cells(self, client: Client) -> None:
        assert strongest_patches(client, [], model="cifar", layer="conv1", channel=0) == []

    def test_what_cannot_be_found_says_so(self, client: Client) -> None:
        with pytest.raises(UnknownLayer, match="cifar has no layer 'nose'; layers: conv1, conv2"):
            strongest_patches(client, [b"one"], model="cifar", layer="nose", channel=0)
        with pytest.raises(ValueError, match="does not state the receptive field"):
            strongest_patches(client, [b"one"], model="cifar", layer="conv2", channel=0)
        with pytest.raises(ValueError, match="at least 1"):
            strongest_patches(client, [b"one"], model="cifar", layer="conv1", channel=0, n=0)
        with pytest.raises(BadImage):
            strongest_patches(client, [b"one", b"bad"], model="cifar", layer="conv1", channel=0)


class TestCommandLine:
    @pytest.fixture
    def pictures(self, tmp_path: Path) -> list[str]:
        for name in ("cat", "bad", "dog"):
            (tmp_path / f"{name}.png").write_bytes(name.encode())
        return [str(tmp_path / f"{name}.png") for name in ("cat", "bad", "dog")]

    def test_strongest_looks_through_the_pictures_that_can_be_read(
        self, url: str, pictures: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        gone = str(tmp_path / "gone.png")
        command = ["strongest", gone, *pictures, "--model", "cifar", "--layer", "conv1", "--channel", "2", "--url", url]
        assert main([*command, "--json"]) == 1
        response = json.loads(capsys.readouterr().out)
        with Client(url) as client:
            patches = strongest_patches(client, [b"cat", b"dog"], model="cifar", layer="conv1", channel=2)
        assert [(patch["picture"], patch["value"]) for patch in response["patches"]] == [
            (pictures[2 * patch.picture_index], patch.value) for patch in patches
        ]
        assert [(item["picture"], item["error"]["code"]) for item in response["failed"]] == [
            (gone, "unreadable"),
            (pictures[1], "bad_image"),
        ]
        assert main(command) == 1
        assert f"– – {pictures[1]} bad_image: not a picture" in " ".join(capsys.readouterr().out.split())

    def test_a_folder_that_exists_is_found_before_anything_is_sent(
        self, stand_in: StandIn, pictures: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "out").mkdir()
        options = ["--layer", "conv1", "--channel", "0", "--save", str(tmp_path / "out")]
        assert main(["strongest", *pictures, "--model", "cifar", *options, "--url", stand_in.rest_url]) == 1
        assert "already exists" in capsys.readouterr().err
        assert not stand_in.requests

    def test_strongest_shows_and_saves(
        self, url: str, pictures: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = tmp_path / "patches"
        files = [pictures[0], pictures[2]]
        arguments = ["strongest", *files, "--model", "cifar", "--layer", "conv1", "--channel", "2", "--url", url]
        assert main([*arguments, "--save", str(folder), "--json"]) == 0
        patches = json.loads(capsys.readouterr().out)["patches"]
        assert sorted(patch["picture"] for patch in patches) == sorted(files)
        assert [Path(patch["saved"]).name for patch in patches] == ["001.png", "002.png"]
        with Client(url) as client:
            [best, _] = strongest_patches(client, files, model="cifar", layer="conv1", channel=2)
        assert np.array_equal(np.asarray(Image.open(folder / "001.png")), best.display_pixels())
        assert main(arguments) == 0
        assert "pixels (rows, columns)" in capsys.readouterr().out


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (2, "L"), (3, "RGB")])
def test_a_patch_shows_itself_in_a_notebook(channels: int, mode: str):
    pixels = np.random.default_rng(0).random((4, 5, channels), np.float32)
    html = Patch(pixels, (0, 0, 4, 5), "<conv1>", (1, 2))._repr_html_()
    assert 'alt="&lt;conv1&gt;, cell (1, 2)"' in html
    [png] = re.findall(r"data:image/png;base64,([^\"]+)", html)
    with Image.open(io.BytesIO(base64.b64decode(png))) as image:
        assert (image.mode, image.size) == (mode, (52 * 5, 52 * 4))


def test_the_command_takes_folders_and_standard_input(
    capsys: pytest.CaptureFixture[str], stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pictures" / "deep").mkdir(parents=True)
    for name in ("a.png", "deep/b.jpg", "notes.txt"):
        (tmp_path / "pictures" / name).write_bytes(name.encode())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"cat")))
    command = ["strongest", "pictures", "-", "--model", "cifar", "--layer", "conv1", "--channel", "1"]
    assert main([*command, "--json", "--url", stand_in.rest_url]) == 0
    found = {patch["picture"] for patch in json.loads(capsys.readouterr().out)["patches"]}
    assert found == {"pictures/a.png", "pictures/deep/b.jpg", "-"}
    with pytest.raises(SystemExit) as caught:
        main([*command, "-n", "0", "--url", stand_in.rest_url])
    assert caught.value.code == 2
    assert "argument -n: must be a whole number of at least 1" in capsys.readouterr().err
