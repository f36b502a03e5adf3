"""Every experiment at a size of seconds: it runs by its command and gives the right kind of answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from convscope import Layer
from PIL import Image

from experiments import (
    atlas,
    attention,
    cause,
    combining,
    corners,
    epochs,
    norm,
    pooling,
    reach,
    relu,
    service,
    sharing,
    transfer,
    turning,
)
from experiments.__main__ import EXPERIMENTS, main
from experiments.experiment import interval
from experiments.learning import CLASSES, INPUT, moved
from handlers.images.preprocessing import normalise

Found = dict[str, Any]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pictures of noise of each class and half, each class with a colour of its own."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for half in ("train", "test"):
        for label in CLASSES:
            (folder / half / label).mkdir(parents=True)
            colour = rng.integers(60, 196, 3)
            for number in range(2):
                noise = np.clip(colour + rng.normal(0, 20, (32, 32, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(noise).save(folder / half / label / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def found(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Run an experiment by its command, once, and return what it writes."""
    out = tmp_path_factory.mktemp("found")

    def run(name: str) -> Found:
        if not (out / f"{name}.json").exists():
            assert main([name, "--small", "--pictures", str(pictures), "--out", str(out)]) == 0
        kept: Found = json.loads((out / f"{name}.json").read_text("utf-8"))
        assert kept["small"]
        return kept["figures"]

    return run


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_command_prints_a_table(name: str, found: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert found(name)
    printed = capsys.readouterr().out
    assert printed.startswith(f"{name}: ")
    assert "| --- |" in printed


def test_marks_in_reach_are_told_apart_and_others_are_not(found: Any) -> None:
    inside, outside = found("reach")["tasks"]
    assert (inside["field"], inside["distance"], inside["in_reach"]) == (7, 6, True)
    assert (outside["distance"], outside["in_reach"]) == (8, False)
    assert min(inside["accuracy"]) > 0.9
    assert max(outside["accuracy"]) < 0.6


def test_a_network_out_of_reach_gives_both_classes_the_same_answer() -> None:
    """Not only is it not learned: whatever the weights, the classes look the same."""
    torch.manual_seed(1)
    model = reach.Window(reach.PLAIN)
    images, differs = reach.draw(64, 8, torch.Generator().manual_seed(0))
    assert 0 < differs.sum() < 64
    assert (images.sum((1, 2, 3)) == 0).all()
    sums = model.sums(images)
    torch.testing.assert_close(sums, sums[:1].expand_as(sums), atol=1e-3, rtol=0)
    near = model.sums(reach.draw(64, 6, torch.Generator().manual_seed(0))[0])
    assert (near - near[:1]).abs().max() > 0.01


def test_the_effective_field_lies_in_the_stated_one(found: Any) -> None:
    for one in found("reach")["fields"]:
        assert 1 <= one["trained"] <= one["stated"]


def test_silencing_changes_probabilities(found: Any) -> None:
    rows = {row["layer"]: row for row in found("cause")["layers"]}
    assert set(rows) == {"block1", "block6"}
    assert rows["block6"]["channels"] == 26
    for row in rows.values():
        assert row["own"]["n"] == row["random"]["n"] == 4
        assert row["difference"]["mean"] == pytest.approx(row["own"]["mean"] - row["random"]["mean"], abs=2e-4)
    assert any(row["own"]["mean"] for row in rows.values())


def test_selective_channels_are_those_larger_for_the_class() -> None:
    rng = np.random.default_rng(0)
    of_class = np.arange(40) < 20
    embeddings = rng.normal(size=(40, 6))
    embeddings[of_class, 4] += 5
    embeddings[of_class, 1] += 2
    assert cause.selective(embeddings, of_class)[:2] == [4, 1]


def test_sharing_carries_to_places_that_were_never_shown(found: Any) -> None:
    shared, unshared = found("sharing")["bars"]
    assert shared["right"][0] > 0.9
    assert unshared["right"][0] < 0.75
    assert unshared["parameters"] == 256 * shared["parameters"]


def test_a_local_layer_with_the_same_weights_everywhere_is_a_convolution() -> None:
    torch.manual_seed(0)
    conv, local = torch.nn.Conv2d(2, 3, 3, padding=1), sharing.Local(2, 3, (5, 5), padding=1)
    with torch.no_grad():
        local.weight.copy_(conv.weight.flatten(1).T.expand_as(local.weight))
        local.bias.copy_(conv.bias[:, None].expand_as(local.bias))
    images = torch.randn(4, 2, 5, 5)
    torch.testing.assert_close(local(images), conv(images))


def test_two_convolutions_without_a_relu_are_one(found: Any) -> None:
    distance = found("relu")["distance"]
    assert distance["without ReLU"] < 1e-5
    assert distance["with ReLU"] > 0.1
    first, second = torch.nn.Conv2d(2, 3, 3), torch.nn.Conv2d(3, 4, 3)
    kernel, bias = relu.composed(first, second)
    images = torch.randn(2, 2, 9, 9)
    torch.testing.assert_close(torch.nn.functional.conv2d(images, kernel, bias), second(first(images)))
    for parts in found("relu")["parts"].values():
        assert {parts[name]["n"] for name in ("kept", "dropped", "both", "dropped_minus_kept")} == {20}
        assert parts["dropped_minus_kept"]["mean"] == pytest.approx(
            parts["dropped"]["mean"] - parts["kept"]["mean"], abs=1e-3
        )


def test_one_batch_of_four_hardly_changes_the_maps(found: Any) -> None:
    assert 0 < found("epochs")["one_batch_of_four"]["maps1"] < 0.3
    assert [row["epoch"] for row in found("epochs")["epochs"]] == [0, 1]
    for row in found("epochs")["epochs"]:
        least, largest = row["seeds"]["edge_share"]
        assert least <= row["edge_share"] <= largest


def test_the_edge_share_knows_edges() -> None:
    edge = torch.tensor([[-1.0, -1, -1], [0, 0, 0], [1, 1, 1]]).expand(1, 3, 3, 3)
    assert epochs.edge_share(edge) == pytest.approx(1)
    assert epochs.edge_share(torch.ones(1, 3, 3, 3)) == pytest.approx(0)
    torch.manual_seed(0)
    assert epochs.edge_share(torch.randn(5000, 3, 3, 3)) == pytest.approx(epochs.CHANCE, abs=0.02)


def test_a_trace_has_the_documents_figures_beside_it(found: Any) -> None:
    digits = found("traces")
    assert digits["document"]["accuracy"][-1] == 0.95
    assert [row["epoch"] for row in digits["epochs"]] == [1, 2]
    assert digits["epochs"][1]["accuracy"] > digits["epochs"][0]["accuracy"]
    assert digits["epochs"][1]["test_accuracy"]["n"] == 100


def test_a_pool_saves_work_and_parameters(found: Any) -> None:
    largest, none = found("pooling")["twins"]
    assert largest["parameters"] == 160 + 2704 * 10 + 10
    assert none["parameters"] == 160 + 10816 * 10 + 10
    assert largest["multiply_adds"] == 26 * 26 * 16 * 9 + 27040
    assert set(found("pooling")["minus_none"]) == {"largest"}
    assert set(found("pooling")["largest_minus"]) == {"none"}
    for kind in pooling.KINDS:
        assert pooling.twin(kind)(torch.zeros(1, 1, 28, 28)).shape == (1, 10)
    values = torch.tensor([[[[1.0, 2], [3, 0]]]])
    assert pooling.twin("smallest").pool1(values).item() == 0
    assert pooling.twin("largest").pool1(values).item() == 3


def test_moved_pictures_are_moved() -> None:
    images = torch.arange(12).reshape(1, 1, 3, 4)
    assert moved(images, 1, -1)[0, 0].tolist() == [[0, 0, 0, 0], [1, 2, 3, 0], [5, 6, 7, 0]]


def test_attention_sees_everything_and_knows_no_order(found: Any) -> None:
    conv, attentive = found("attention")["layers"]
    assert (conv["cells_seen"], attentive["cells_seen"]) == (9, 256)
    assert conv["shuffled"] > 0.5
    assert attentive["shuffled"] < 1e-5
    model = attention.Everywhere()
    images, _ = reach.draw(2, 3, torch.Generator(), attention.SIDE)
    rolled = model.eval()(images.roll((2, 5), (2, 3)))
    torch.testing.assert_close(rolled, model(images), atol=1e-5, rtol=1e-4)


def test_a_p4_network_answers_turned_pictures_alike(found: Any) -> None:
    p4, plain, _ = found("turning")["networks"]
    assert p4["logits_change"] < 1e-4 < plain["logits_change"]
    layer = found("turning")["layer"]
    assert layer["p4, each channel with the one that takes its place"] < 1e-5
    assert layer["p4, channel by channel"] > 0.5
    torch.manual_seed(0)
    maps = torch.randn(2, 3, 4, 9, 9)
    turn = turning.Turning(3, 5)
    expected = turn(maps).rot90(1, (3, 4)).roll(1, 2)
    torch.testing.assert_close(turn(maps.rot90(1, (3, 4)).roll(1, 2)), expected, atol=1e-5, rtol=1e-4)


def test_embeddings_are_classified(found: Any) -> None:
    assert found("transfer")["layers"][0]["trained"]["n"] == 20
    rng = np.random.default_rng(0)
    labels = np.arange(30) % 3
    vectors = np.eye(3)[labels] + 0.1 * rng.normal(size=(30, 3))
    assert (transfer.classify(vectors[:20], labels[:20], vectors[20:], 3) == labels[20:]).all()


def test_purity_is_of_the_strongest_pictures(found: Any) -> None:
    labels = np.repeat([0, 1], 9)
    values = np.stack([np.arange(18), np.arange(18) % 2 * 10 + np.arange(18) / 20], 1).astype(np.float32)
    purity, best = atlas.purities(values, labels)
    assert purity.tolist() == [9, 5]
    dead = np.zeros((18, 1), np.float32)  # All pictures are its strongest: the first nine, of one class, say nothing.
    dead[:5] = 1
    assert atlas.purities(dead, labels)[0].tolist() == [0]
    assert best[0].tolist() == list(range(17, 8, -1))
    assert {row["layer"] for row in found("atlas")["layers"]} == {"block5", "block7"}
    assert set(found("atlas")["cifar"]) == {"conv1", "conv2"}


def test_a_cell_looks_only_at_its_field(found: Any) -> None:
    assert set(found("atlas")["pictures"]) == {"deep", "cifar"}
    layer = Layer("block3", "block3.relu", (64, 16, 16), (2, 2), (14, 14), (-6, -6), 0, {})
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    looking = atlas.Looking(service.first_weights("deep"))
    heat = np.concatenate([looking.heat(layer, channel, (8, 8), image) for channel in (0, 1)])
    assert heat.shape == (2, 32, 32)
    is_inside = np.zeros((32, 32), bool)
    is_inside[9:25, 9:25] = True  # Pixels 10 to 23, and what squares of 2 pixels cover beside them.
    assert np.abs(heat[:, ~is_inside]).max() < 1e-5 < np.abs(heat).max()


def test_edges_and_corners_are_where_they_are(found: Any) -> None:
    rows = found("corners")["rows"]
    assert rows["edges"]["edges"]["mean"] > rows["brightness"]["edges"]["mean"] + 0.1
    assert rows["trained"]["corners"]["n"] == 20
    square = np.zeros((12, 12), np.uint8)
    square[4:, 4:] = 255
    larger, smaller = corners.eigenvalues(square)  # The window of cell (i, j) has its middle at pixel (i + 1, j + 1).
    assert np.unravel_index(smaller.argmax(), smaller.shape) in [(row, column) for row in (2, 3) for column in (2, 3)]
    assert smaller[7, 3] == pytest.approx(0)
    assert larger[7, 3] > 0.5
    assert larger[8, 8] == larger[0, 0] == 0


def test_one_filter_explains_a_convolution_and_not_its_relu() -> None:
    torch.manual_seed(0)
    layer = Layer("conv1", "conv1", (4, 12, 12), (1, 1), (3, 3), (-1, -1), 0, {})
    images = list(np.random.default_rng(0).integers(0, 256, (12, 12, 12, 3)).astype(np.uint8))
    with torch.no_grad():
        maps = torch.nn.Conv2d(3, 4, 3, padding=1)(torch.from_numpy(np.stack(images) / 255).permute(0, 3, 1, 2).float())
    maps -= maps.mean((0, 2, 3), keepdim=True)
    assert combining.left_over(layer, images, list(maps.numpy())).max() < 1e-6
    assert combining.left_over(layer, images, list(maps.relu().numpy())).min() > 0.05


def test_half_of_what_excites_a_cell_comes_from_the_largest_channels(found: Any) -> None:
    for one in found("combining")["combined"]:
        assert 1 <= one["trained"]["mean"] <= one["of"]
    parts = torch.tensor([[5.0, 4, 1, -8], [1, 1, 1, 1], [0, 0, 9, 0]])
    assert combining.channels_for_half(parts).tolist() == [1, 2, 1]


def test_a_cell_is_the_sum_of_what_channels_give() -> None:
    model: Any = service.first_weights("cifar")
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    parts = combining.contributions(model, "conv2", "conv2", images)
    with torch.no_grad():
        maps = model.conv2(model.pool1(model.relu1(model.conv1(normalise(images, INPUT)))))
    expected = maps.transpose(0, 1).flatten(1).max(1).values - model.conv2.bias
    torch.testing.assert_close(parts.sum(1), expected.detach(), atol=1e-4, rtol=1e-4)


def test_augmented_twins_are_probed_beside_plain_ones(found: Any) -> None:
    rows = {row["change"]: row for row in found("augmentation")["rows"]}
    assert rows["scaled by 1"]["agreement"]["recipe"] == {"mean": 1.0, "low": 1.0, "high": 1.0, "n": 20}
    for row in rows.values():
        for score in ("agreement", "accuracy"):
            values = row[score]
            assert values["difference"]["mean"] == pytest.approx(
                values["turned"]["mean"] - values["recipe"]["mean"], abs=2e-4
            )
            assert values["seeds"]["turned"] == [pytest.approx(values["turned"]["mean"], abs=1e-3)]
    assert set(found("augmentation")["upright"]) == {"recipe", "turned"}


def test_a_normalised_twin_has_the_same_convolutions(found: Any) -> None:
    [row] = found("norm")["rates"]
    assert row["with"]["n"] == row["difference"]["n"] == 20
    torch.manual_seed(0)
    plain = norm.twin(False)
    torch.manual_seed(0)
    normalised: Any = norm.twin(True)
    torch.testing.assert_close(normalised.conv1[0].weight, plain.conv1.weight)
    maps = normalised.train().conv1(torch.rand(8, 3, 32, 32))
    torch.testing.assert_close(maps.mean((0, 2, 3)), torch.zeros(16), atol=1e-5, rtol=0)


def test_the_service_answers_what_is_computed_by_hand(found: Any) -> None:
    figures = found("edge")
    assert figures["maps"]["square"][0] == [1, 2, 3, 2, 1]
    assert all(figures["by_hand"].values())
    assert sum(map(sum, figures["products"])) == figures["sum"] == figures["maps"]["square"][0][2]


def test_stages_are_those_of_the_documents(found: Any) -> None:
    for network in found("stages").values():
        assert [one["shape"] for one in network["stages"]] == network["stated"]


def test_wrong_spellings_are_errors(found: Any) -> None:
    outcomes = {line["code"]: line["found"] for line in found("spelling")["lines"]}
    assert outcomes["nn.Conv2d(1, 1, 3)"] == "1×3×3"
    assert outcomes["nn.Conv2d(3, 16)"] == "TypeError, when it is written"
    assert outcomes["nn.Conv2d(3, 16, 3)"] == "RuntimeError, when it meets the picture"


def test_an_interval_holds_its_mean() -> None:
    values = np.random.default_rng(0).normal(1, 0.5, 400)
    one = interval(values)
    assert one["low"] < one["mean"] < one["high"]
    assert one["high"] - one["low"] == pytest.approx(2 * 1.96 * 0.5 / 20, rel=0.2)
    assert interval([1.0, 1.0]) == {"mean": 1.0, "low": 1.0, "high": 1.0, "n": 2}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["all", "page"], "all stands alone"),
        (["reach", "--small"], "--small needs an --out of its own"),
        (["reach", "--small", "--out", "{file}"], "File exists"),
        (["relu", "--small", "--out", "{folder}", "--pictures", "{folder}/none"], "no pictures in"),
        (["edge", "--small", "--out", "{folder}", "--url", "http://127.0.0.1:9"], "refused"),
    ],
)
def test_a_wrong_argument_is_said_in_a_line(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    places = {"file": tmp_path / "file", "folder": tmp_path}
    try:
        status: Any = main([argument.format(**places) for argument in arguments])
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    assert words in capsys.readouterr().err.splitlines()[-1]
