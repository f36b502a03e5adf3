"""The claims, numbers and exercises of the five documents: each verdict is checked, and written to docs/claims.md.

A claim has one or several parts. Each is computed here (shapes, counts, formulas), read from a model card, or read from
the figures of an experiment (docs/experiments/*.json). A claim holds if all parts are true, holds in part if some are,
and does not hold if none is. A part that no experiment shows is False. The verdicts in `CLAIMS` are written by hand;
`check` names those that differ from the computed ones, so neither the table nor the figures can change alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any
from zipfile import ZipFile

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, max_pool2d, pad

from archiver.geometry import layer_geometry
from experiments import learning, service
from experiments.epochs import CHANCE, edge_share
from experiments.experiment import markdown
from experiments.spelling import outcome
from handlers.images.preprocessing import Preprocessing, normalise
from handlers.networks.edges import KERNEL

HOLDS, PARTLY, FAILS, UNTESTED = "holds", "in part", "does not hold", "not tested"
SQUARE = [[1, 2, 3, 2, 1], [1, 1, 2, 1, 1], [0, 0, 0, 0, 0], [-1, -1, -2, -1, -1], [-1, -2, -3, -2, -1]]


class Evidence:
    """Evidence that the parts of claims are checked against.

    Args:
        root: Root of the repository.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def card(self, model: str) -> dict[str, Any]:
        """Return card.json of an archive."""
        with ZipFile(self.root / "model_store" / f"{model}.mar") as archive:
            values: dict[str, Any] = json.loads(archive.read("card.json"))
        return values

    def layer(self, model: str, name: str) -> dict[str, Any]:
        """Return what the card says of a layer."""
        found: dict[str, Any] = next(one for one in self.card(model)["network"]["layers"] if one["name"] == name)
        return found

    def accuracy(self, model: str, half: str = "test") -> float:
        """Return a network's accuracy, 0..1, as its card has it."""
        return float(self.card(model)["training"][f"{half}_accuracy"])

    def found(self, experiment: str) -> dict[str, Any]:
        """Return the figures of an experiment."""
        text = (self.root / f"docs/experiments/{experiment}.json").read_text("utf-8")
        values: dict[str, Any] = json.loads(text)["figures"]
        return values

    def shapes_hold(self, model: str) -> bool:
        """Return whether a picture goes through the stages that the documents state."""
        found = self.found("stages")[model]
        return bool([one["shape"] for one in found["stages"]] == found["stated"])

    def reach(self, field: int, distance: int) -> float:
        """Return the best accuracy of any seed at a distance: what the network can learn."""
        tasks = self.found("reach")["tasks"]
        task = next(one for one in tasks if (one["field"], one["distance"]) == (field, distance))
        return float(max(task["accuracy"]))

    def turned(self, network: str, angle: int) -> float:
        """Return the accuracy of a network of `turning` at an angle."""
        found = next(one for one in self.found("turning")["networks"] if one["network"].startswith(network))
        return float(found["accuracy"][str(angle)]["mean"])

    def augmented(self, change: str, score: str) -> dict[str, dict[str, float]]:
        """Return a score of `augmentation`, by the recipe, also turned and scaled, and their difference."""
        rows = self.found("augmentation")["rows"]
        found: dict[str, dict[str, float]] = next(one for one in rows if one["change"] == change)[score]
        return found

    def unexplained(self, network: str, layer: str) -> dict[str, float]:
        """Return what one linear filter leaves of the maps of a trained layer, of `combining`."""
        rows = self.found("combining")["unexplained"]
        found: dict[str, float] = next(one for one in rows if (one["network"], one["layer"]) == (network, layer))[
            "trained"
        ]
        return found

    def bars(self, is_shared: bool, half: str) -> float:
        """Return the mean accuracy of `sharing` on bars."""
        found = next(one for one in self.found("sharing")["bars"] if one["is_shared"] == is_shared)
        return float(sum(found[half]) / len(found[half]))

    def shuffled(self, model: str) -> tuple[float, float]:
        """Return the accuracy on pictures as they are and on pixels in another order: means of docs/networks.md."""
        lines = (self.root / "docs/networks.md").read_text("utf-8").splitlines()
        start = next(place for place, line in enumerate(lines) if "training.shuffled" in line)
        row = next(line for line in lines[start:] if line.startswith(f"| `{model}` |"))
        plain, mixed = (mean(map(float, cell.split(","))) for cell in row.split("|")[2:4])
        return plain, mixed

    @cached_property
    def scaled_digits(self) -> tuple[float, float]:
        """Return the accuracy of the served `digits` on its test digits, and on the same at 0.6 of the size."""
        corpus = learning.digits()
        model = service.trained(self.root / "model_store", "digits")
        small = interpolate(corpus.test.images.float(), scale_factor=0.6, mode="bilinear", antialias=True)
        side = small.shape[2]
        before = (28 - side) // 2
        small = pad(small, (before, 28 - side - before) * 2)
        preprocessing = Preprocessing.from_dict(self.card("digits")["preprocessing"])
        answers = [
            model(normalise(images.round().to(torch.uint8), preprocessing)).argmax(1)
            for images in (corpus.test.images.float(), small)
        ]
        plain, scaled = (float((one == corpus.test.labels).double().mean()) for one in answers)
        return plain, scaled


@dataclass(frozen=True)
class Claim:
    """A claim, number or exercise of the documents.

    Attributes:
        text: What is claimed.
        where: Document and place: S0 the digit pipeline, S1 why CNNs detect spatial patterns, S2 the edge filter and
            the basics, S3 two convolutions on CIFAR-10, S4 the wider pipeline.
        shown: What shows it: an experiment of docs/experiments.md, a card, or an arithmetic fact.
        verdict: One of `HOLDS`, `PARTLY`, `FAILS`, `UNTESTED`.
        parts: Computes what the claim says, part by part; None for `UNTESTED`.
        note: What the verdict rests on, if that is not plain.
    """

    text: str
    where: str
    shown: str
    verdict: str
    parts: Callable[[Evidence], Sequence[bool]] | None
    note: str = ""

    def judged(self, evidence: Evidence) -> str:
        """Return the verdict that the evidence gives."""
        if self.parts is None:
            return UNTESTED
        parts = [bool(part) for part in self.parts(evidence)]
        return HOLDS if all(parts) else PARTLY if any(parts) else FAILS


def side(size: int, kernel: int, stride: int = 1, padding: int = 0) -> int:
    """Return the side of a convolution's map, as torch computes it."""
    layer = nn.Conv2d(1, 1, kernel, stride=stride, padding=padding)
    return int(layer(torch.zeros(1, 1, size, size)).shape[2])


def field(dilations: Sequence[int], stride: int = 1) -> int:
    """Return the receptive field of 3×3 convolutions in a row, as cards have it."""
    layers = nn.Sequential(*(nn.Conv2d(1, 1, 3, stride, padding=one, dilation=one) for one in dilations))
    found = layer_geometry(layers, {"last": str(len(dilations) - 1)}, (1, 64, 64))["last"].receptive_field
    return found[0] if found else 0


def follows(by: int, is_pooled: bool) -> bool:
    """Return whether the map of a moved picture is the moved map, away from the border."""
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, 3, padding=1)
    wide = torch.randn(1, 3, 40, 40)

    def maps(image: Tensor) -> Tensor:
        made: Tensor = layer(image)
        return max_pool2d(made, 2) if is_pooled else made

    with torch.no_grad():
        was, now = maps(wide[:, :, 4:36, 4:36]), maps(wide[:, :, 4 - by : 36 - by, 4:36])
    cells = by // 2 if is_pooled else by
    return bool(torch.allclose(now[:, :, 3 + cells : -3], was[:, :, 3 : -3 - cells], atol=1e-5))


def border_is_felt() -> bool:
    """Return whether a padded convolution makes other cells at the border of a uniform picture."""
    torch.manual_seed(0)
    maps = nn.Conv2d(1, 4, 3, padding=1)(torch.ones(1, 1, 8, 8))
    away = (maps - maps[:, :, 4:5, 4:5]).abs()
    return bool(away[:, :, 1:-1, 1:-1].max() < 1e-5) and bool(away[:, :, 0].max() > 0.01)


def purity(evidence: Evidence, layer: str, model: str) -> float:
    """Return the mean purity of a layer's channels, of `atlas`."""
    rows = evidence.found("atlas")["layers"]
    return float(next(one for one in rows if one["layer"] == layer)[model]["mean"])


ERROR = "RuntimeError, when it meets the picture"
CLAIMS: tuple[Claim, ...] = (
    Claim(
        "the input is 1×28×28, a 7 for instance",
        "S0 stage 1",
        "card `digits`, `samples/digit-7.png`",
        HOLDS,
        lambda e: (e.layer("digits", "conv1")["input_shape"] == [1, 28, 28],),
    ),
    Claim(
        "16 filters of 3×3 without padding: 28 → 26, 16 maps",
        "S0 stage 2, quiz",
        "card `digits`",
        HOLDS,
        lambda e: (e.layer("digits", "conv1")["shape"] == [16, 26, 26], side(28, 3) == 26),
    ),
    Claim(
        "the maps highlight edges and corners of the digit",
        "S0 stage 2",
        "[corners](experiments.md#corners); weights of `digits`",
        PARTLY,
        lambda e: (
            *(
                e.found("corners")["rows"]["trained"][where]["low"]
                > e.found("corners")["rows"]["brightness"][where]["high"]
                and e.found("corners")["trained_minus_untrained"][where]["low"] > 0
                for where in ("edges", "corners")
            ),
            edge_share(digit_kernels(e)) > CHANCE + 0.05,
        ),
        "by little more than brightness or random filters; its kernels are no more like edge kernels than random ones",
    ),
    Claim(
        "max pool: 26 → 13",
        "S0 stage 3",
        "[stages](experiments.md#stages)",
        HOLDS,
        lambda e: (e.found("stages")["digits"]["stages"][1]["shape"] == "16×13×13",),
    ),
    Claim(
        "a pool keeps the strongest, the important features",
        "S0, S4",
        "[pooling](experiments.md#pooling)",
        HOLDS,
        lambda e: (
            e.found("pooling")["minus_none"]["largest"]["0"]["low"] > -0.02,
            e.found("pooling")["largest_minus"]["smallest"]["low"] > 0,
            e.found("pooling")["largest_minus"]["stride"]["low"] > 0,
        ),
        "the largest is better than the smallest, than one place of four, and than no pool",
    ),
    Claim(
        "flatten: 13·13·16 = 2704, fully connected to 10",
        "S0 stages 4 and 5",
        "[stages](experiments.md#stages)",
        HOLDS,
        lambda e: (e.shapes_hold("digits"), 13 * 13 * 16 == 2704),
    ),
    Claim(
        "`digits`: loss 0.2 and accuracy 0.95 after 5 epochs, from 1.2 and 0.55",
        "S0 trace",
        "[traces](experiments.md#traces)",
        PARTLY,
        lambda e: (
            e.found("traces")["epochs"][-1]["accuracy"] >= 0.94,
            abs(e.found("traces")["epochs"][0]["accuracy"] - 0.55) < 0.1,
        ),
        "the end is reached; the first epoch is far better than stated",
    ),
    Claim(
        "from epoch 2 on the filters detect clearer edges",
        "S0, S4 traces",
        "[epochs](experiments.md#epochs); weights of `digits`",
        PARTLY,
        lambda e: (
            e.found("epochs")["epochs"][2]["edge_share"] > e.found("epochs")["epochs"][0]["edge_share"] + 0.05,
            edge_share(digit_kernels(e)) > CHANCE + 0.05,
        ),
        "those of `simple` become more like edge kernels; those of `digits` do not (claim 3)",
    ),
    Claim(
        "a prediction goes through the stages one after the other",
        "S0, S4",
        "[stages](experiments.md#stages)",
        HOLDS,
        lambda e: [e.shapes_hold(model) for model in ("digits", "simple", "cifar")],
    ),
    Claim(
        "small filters find local patterns",
        "S0 Q1, S2, S4 Q1",
        "card `cifar`",
        HOLDS,
        lambda e: (e.layer("cifar", "conv1")["receptive_field"] == [3, 3],),
    ),
    Claim(
        "`Conv2d(1, 10, 3)` is right, `Conv1d` and `Linear` are wrong",
        "S0 Q2",
        "[spelling](experiments.md#spelling)",
        HOLDS,
        lambda e: (
            outcome("nn.Conv2d(1, 10, 3)", (1, 28, 28)) == "10×26×26",
            outcome("nn.Conv1d(1, 10, 3)", (1, 28, 28)) == ERROR,
            outcome("nn.Linear(1, 10)", (1, 28, 28)) == ERROR,
        ),
    ),
    Claim(
        "`Conv2d(1, 1, 3)` on 5×5 gives 3×3",
        "S0 Q3",
        "arithmetic",
        HOLDS,
        lambda e: (outcome("nn.Conv2d(1, 1, 3)", (1, 5, 5)) == "1×3×3",),
    ),
    Claim(
        "the output's side is in - k + 1",
        "S0 Q3, S4 Q3",
        "arithmetic",
        PARTLY,
        lambda e: (
            all(side(size, k) == size - k + 1 for size in (5, 28, 32) for k in (1, 3, 5)),
            side(28, 3, stride=2, padding=3) == 28 - 3 + 1,
        ),
        "without padding, stride and dilation; [lesson 5](lessons.md#5-pooling-padding-stride-and-dilation) has all",
    ),
    Claim(
        "a layer of three channels that is given one is an error",
        "S0 Q4",
        "[spelling](experiments.md#spelling)",
        HOLDS,
        lambda e: (outcome("nn.Conv2d(3, 16, 3)", (1, 28, 28)) == ERROR,),
    ),
    Claim(
        "several layers combine simple patterns into higher ones",
        "S0 Q5, S1 step 5, S3",
        "[atlas](experiments.md#atlas), [combining](experiments.md#combining)",
        PARTLY,
        lambda e: (
            purity(e, "block7", "deep") > purity(e, "block1", "deep") + 2,
            purity(e, "block7", "deep-untrained") < purity(e, "block1", "deep-untrained") + 1,
            all(one["trained"]["low"] > 2 for one in e.found("combining")["combined"]),
        ),
        "training makes channels of `deep` selective; 3 to 11 make half of a strongest cell there, 1.7 in `cifar`",
    ),
    Claim(
        "the answer to Q4 is A",
        "S0 Q4",
        "[spelling](experiments.md#spelling)",
        FAILS,
        lambda e: (outcome("nn.Conv2d(3, 16, 3)", (1, 28, 28)) != ERROR,),
        "a slip of the document: its own explanation says that it is an error",
    ),
    Claim(
        "a CNN keeps positions",
        "S1, What",
        "arithmetic",
        HOLDS,
        lambda e: (follows(1, False), follows(4, False)),
    ),
    Claim(
        "it detects a feature wherever it is",
        "S1, Why",
        "[sharing](experiments.md#sharing)",
        HOLDS,
        lambda e: (e.bars(True, "right") > 0.95,),
    ),
    Claim(
        "without CNNs computers would struggle with pictures",
        "S1",
        "cards `flat`, `cifar`",
        PARTLY,
        lambda e: (e.accuracy("cifar") > e.accuracy("flat") + 0.1, e.accuracy("flat") < 0.2),
        "a fully connected twin has 0.16 less accuracy (n = 8,000), far above chance (0.10)",
    ),
    Claim(
        "where a pixel is matters",
        "S1 step 1",
        "[networks.md](networks.md), pixels shuffled",
        HOLDS,
        lambda e: (e.shuffled("cifar")[0] > e.shuffled("cifar")[1] + 0.05,),
    ),
    Claim(
        "flattening first loses position",
        "S1 step 2, myth 2, pitfall 1",
        "[networks.md](networks.md), pixels shuffled",
        HOLDS,
        lambda e: (abs(e.shuffled("flat")[0] - e.shuffled("flat")[1]) < 0.02,),
        "a fully connected network learns pixels in any order equally well",
    ),
    Claim(
        "a filter multiplies, sums, slides",
        "S1 step 3",
        "[edge](experiments.md#edge)",
        HOLDS,
        lambda e: [*e.found("edge")["by_hand"].values(), e.found("edge")["sum"] == 3],
    ),
    Claim(
        "the same weights everywhere: fewer parameters",
        "S1 step 4",
        "card `cifar`; [sharing](experiments.md#sharing)",
        HOLDS,
        lambda e: (
            e.layer("cifar", "conv1")["parameters"] == 448,
            e.layer("cifar", "conv1")["dense_parameters"] == 50_348_032,
            e.found("sharing")["bars"][0]["parameters"] * 256 == e.found("sharing")["bars"][1]["parameters"],
        ),
        "of the factor 112,384, sharing is 1,024 and locality about 110",
    ),
    Claim(
        "sharing is why CNNs generalise well",
        "S1 step 4",
        "[sharing](experiments.md#sharing)",
        PARTLY,
        lambda e: (
            e.bars(True, "right") > e.bars(False, "right") + 0.3,
            all(one["difference"]["low"] > 0 for one in e.found("sharing")["digits"]),
        ),
        "over places yes, and only with sharing; on centred digits no gain was seen",
    ),
    Claim(
        "it is computationally efficient",
        "S1 step 4",
        "card `cifar`",
        PARTLY,
        lambda e: (
            e.layer("cifar", "conv1")["multiply_adds"] * 100 < 3 * 32 * 32 * 16 * 32 * 32,
            e.layer("cifar", "conv1")["multiply_adds"] < 16 * 32 * 32 * 27,
        ),
        "locality saves work (50 million to 442 thousand); sharing saves parameters and no work",
    ),
    Claim(
        "an edge at the top left is treated as one at the bottom right",
        "S1 step 4",
        "arithmetic; [sharing](experiments.md#sharing)",
        HOLDS,
        lambda e: (follows(4, False), e.bars(True, "right") > 0.95),
    ),
    Claim(
        "pools take the largest value or the average",
        "S1 step 5",
        "[pooling](experiments.md#pooling)",
        HOLDS,
        lambda e: [e.found("pooling")["minus_none"][kind]["0"]["low"] > -0.03 for kind in ("largest", "average")],
    ),
    Claim(
        "pooling makes a network robust to small shifts",
        "S1 step 5",
        "[pooling](experiments.md#pooling)",
        HOLDS,
        lambda e: (e.found("pooling")["minus_none"]["largest"]["1"]["low"] > 0,),
    ),
    Claim(
        "pooling reduces the work",
        "S1 step 5, S4",
        "[pooling](experiments.md#pooling)",
        HOLDS,
        lambda e: (
            e.found("pooling")["cifar"]["conv2_multiply_adds"]["not pooled"]
            == 4 * e.layer("cifar", "conv2")["multiply_adds"],
        ),
    ),
    Claim(
        "pooling builds a hierarchy",
        "S1 step 5",
        "card `cifar`; [atlas](experiments.md#atlas)",
        PARTLY,
        lambda e: (
            e.layer("cifar", "conv2")["receptive_field"] == [8, 8],
            e.found("atlas")["cifar"]["conv2"]["mean"] > e.found("atlas")["cifar"]["conv1"]["mean"] + 0.5,
        ),
        "the field grows from 5 to 8; with two layers no hierarchy is seen",
    ),
    Claim(
        "translation equivariance: maps move with the picture",
        "S1 step 6",
        "arithmetic; [lesson 3](lessons.md#3-translation-equivariance)",
        PARTLY,
        lambda e: (follows(1, False), follows(2, True), follows(1, True)),
        "away from the border, and behind a pool by even moves only",
    ),
    Claim("this is crucial for detection", "S1 step 6", "", UNTESTED, None, "no detector is served here"),
    Claim(
        "how CNNs differ from fully connected networks: fewer weights, local, position kept",
        "S1 step 6",
        "cards `cifar`, `flat`",
        HOLDS,
        lambda e: (
            e.layer("cifar", "conv1")["parameters"] < e.layer("flat", "fc1")["parameters"],
            not e.layer("flat", "fc1").get("receptive_field"),
        ),
    ),
    Claim(
        "long range is out of reach of small windows; depth helps",
        "S1 step 7, myth 4",
        "[reach](experiments.md#reach)",
        HOLDS,
        lambda e: (
            e.reach(7, 6) > 0.95,
            e.reach(7, 8) < 0.6,
            e.layer("deep", "block7")["receptive_field"] == [80, 80],
        ),
    ),
    Claim(
        "dilated convolutions help",
        "S1 step 7, expert 3",
        "[reach](experiments.md#reach)",
        HOLDS,
        lambda e: (e.reach(15, 8) > 0.95, e.reach(15, 14) > 0.95, e.reach(15, 16) < 0.6),
    ),
    Claim(
        "attention helps",
        "S1 step 7",
        "[attention](experiments.md#attention)",
        HOLDS,
        lambda e: (
            max(next(one for one in e.found("attention")["tasks"] if one["distance"] == 8)["attention"]) > 0.95,
            max(next(one for one in e.found("attention")["tasks"] if one["distance"] == 8)["convolutions"]) < 0.6,
        ),
    ),
    Claim(
        "CNNs are not invariant to rotation",
        "S1 step 7, myth 3, pitfall 3",
        "[turning](experiments.md#turning)",
        HOLDS,
        lambda e: (e.turned("plain, upright", 90) < e.turned("plain, upright", 0) - 0.3,),
    ),
    Claim(
        "nor to scale",
        "S1 step 7, myth 3, pitfall 3",
        "`digits` at 0.6 of the size (n = 1,000, by this check); [augmentation](experiments.md#augmentation)",
        HOLDS,
        lambda e: (
            e.scaled_digits[1] < e.scaled_digits[0] - 0.1,
            e.augmented("scaled by 0.5", "accuracy")["recipe"]["high"]
            < e.augmented("scaled by 1", "accuracy")["recipe"]["low"],
        ),
    ),
    Claim(
        "augmentation repairs that",
        "S1 pitfall 3",
        "[turning](experiments.md#turning), [augmentation](experiments.md#augmentation)",
        PARTLY,
        lambda e: (
            e.turned("plain, turned", 90) > e.turned("plain, upright", 90) + 0.2,
            e.augmented("turned by 30°", "accuracy")["difference"]["low"] > 0,
            e.augmented("scaled by 1.5", "accuracy")["difference"]["low"] > 0,
            e.augmented("scaled by 0.7", "accuracy")["difference"]["low"] > 0,
        ),
        "for turns (`cifar`: from 30° to 60°); smaller pictures gain nothing, and `cifar` loses 0.07 on upright ones",
    ),
    Claim(
        "rotation-equivariant layers do too",
        "S1 pitfall 3, step 7",
        "[turning](experiments.md#turning)",
        HOLDS,
        lambda e: (
            e.found("turning")["networks"][0]["logits_change"] < 1e-4,
            abs(e.turned("p4", 90) - e.turned("p4", 0)) < 0.01,
        ),
        "exactly, for turns by 90°",
    ),
    Claim("CNNs mimic the visual cortex", "S1", "", UNTESTED, None, "not a question for a served network"),
    Claim(
        "fully connected networks were poor and costly",
        "S1, S4",
        "cards `flat`, `cifar`",
        HOLDS,
        lambda e: (
            e.accuracy("flat") < e.accuracy("cifar"),
            e.layer("cifar", "conv1")["dense_parameters"] > 50_000_000,
        ),
    ),
    Claim(
        "myth 1: filters are not set, they adapt in training",
        "S1",
        "[epochs](experiments.md#epochs)",
        HOLDS,
        lambda e: (e.found("epochs")["epochs"][-1]["kernels"] > 0.2,),
    ),
    Claim(
        "padding affects the border",
        "S1 expert 2",
        "arithmetic; [lesson 5](lessons.md#5-pooling-padding-stride-and-dilation)",
        HOLDS,
        lambda e: (border_is_felt(),),
    ),
    Claim(
        "stride and dilation trade resolution for field",
        "S1 expert 3",
        "arithmetic",
        HOLDS,
        lambda e: (field((1, 1, 1)) == 7, field((1, 1, 1), 2) == 15, field((1, 2, 4)) == 15),
    ),
    Claim("not for sequences and graphs", "S1", "", UNTESTED, None, "out of scope: pictures only"),
    Claim(
        "in production: augmentation, batch normalisation, transfer learning",
        "S1",
        "[augmentation](experiments.md#augmentation), [norm](experiments.md#norm), [transfer](experiments.md#transfer)",
        PARTLY,
        lambda e: (
            e.augmented("turned by 30°", "accuracy")["difference"]["low"] > 0,
            *(one["difference"]["low"] > 0 for one in e.found("norm")["rates"]),
            max(one["minus_untrained"]["low"] for one in e.found("transfer")["layers"]) > 0,
        ),
        "batch normalisation cost `cifar` accuracy at its recipe's rate, and gained some at ten times that rate",
    ),
    Claim(
        "filters are filters in the sense of Fourier",
        "S1, connections",
        "`edges`; [lesson 6](lessons.md#6-hierarchy-from-edges-to-shapes)",
        HOLDS,
        lambda e: (abs(torch.fft.fft2(torch.tensor(KERNEL))[0, 0]) < 1e-6, sum(map(sum, KERNEL)) == 0),
        "an edge filter lets no plain grey through",
    ),
    Claim("the analogy with music", "S1", "", UNTESTED, None, "an analogy"),
    Claim(
        "pitfall 1: Conv2d(1, 32, 3) instead of Linear(784, 128) first",
        "S1",
        "arithmetic",
        PARTLY,
        lambda e: (
            1 * 32 * 9 + 32 < 784 * 128 + 128,
            (1 * 32 * 9 + 32) + (26 * 26 * 32 * 10 + 10) < (784 * 128 + 128) + (128 * 10 + 10),
        ),
        "the layer has 320 parameters instead of 100,480; the network 216,650 instead of 101,770",
    ),
    Claim(
        "pitfall 2: weights of their own at each position",
        "S1",
        "[sharing](experiments.md#sharing)",
        HOLDS,
        lambda e: (e.bars(False, "left") > 0.9, e.bars(False, "right") < 0.7),
        "what is learned at one place is not known elsewhere",
    ),
    Claim(
        "the diagram of a 5×5 picture and its map",
        "S1",
        "[edge](experiments.md#edge)",
        HOLDS,
        lambda e: (len(e.found("edge")["maps"]["square"]) == 5,),
    ),
    Claim("uses: photographs, X-rays, satellites, text, spectrograms", "S2", "", UNTESTED, None, "context"),
    Claim(
        "`Conv2d(3, 16, 5)` on 32×32 gives 28×28",
        "S2",
        "arithmetic",
        HOLDS,
        lambda e: (outcome("nn.Conv2d(3, 16, 5)", (3, 32, 32)) == "16×28×28",),
    ),
    Claim(
        "the edge kernel on the 5×5 square (the document leaves the result open)",
        "S2",
        "[edge](experiments.md#edge)",
        HOLDS,
        lambda e: (e.found("edge")["maps"]["square"] == SQUARE,),
    ),
    Claim(
        "padding keeps the size, so that spatial information is preserved",
        "S2 notes",
        "arithmetic; [lesson 5](lessons.md#5-pooling-padding-stride-and-dilation)",
        PARTLY,
        lambda e: (side(28, 3, padding=1) == 28, not border_is_felt()),
        "the size yes; the border's cells see a frame that no picture has",
    ),
    Claim(
        "kernels act as filters for edges and textures",
        "S2 notes",
        "`edges`; [edge](experiments.md#edge)",
        PARTLY,
        lambda e: (
            e.found("edge")["maps"]["flat"][2] == [0] * 5,
            e.found("edge")["maps"]["square"][0][2] == 3,
            False,  # Textures: no experiment has any.
        ),
        "for edges; nothing here tests textures",
    ),
    Claim(
        "`simple`: training accuracy 0.85, validation 0.80",
        "S3",
        "card `simple`",
        FAILS,
        lambda e: (e.accuracy("simple", "train") > 0.83, e.accuracy("simple") > 0.78),
        "0.742 and 0.640 (n = 8,000)",
    ),
    Claim(
        "`simple`: maps 6×32×32 and 12×16×16",
        "S3",
        "card `simple`",
        HOLDS,
        lambda e: (
            e.layer("simple", "conv1")["shape"] == [6, 32, 32],
            e.layer("simple", "conv2")["shape"] == [12, 16, 16],
        ),
    ),
    Claim(
        "task: `simple`'s maps of both convolutions, before pooling, as rows of grey pictures",
        "S3",
        "[stages](experiments.md#stages)",
        HOLDS,
        lambda e: ((e.root / "docs/experiments/stages.png").exists(), e.shapes_hold("simple")),
    ),
    Claim(
        "the maps shown there highlight what was learned",
        "S3",
        "[epochs](experiments.md#epochs)",
        FAILS,
        lambda e: (
            e.found("epochs")["one_batch_of_four"]["maps1"] > 0.5 * e.found("epochs")["epochs"][-1]["maps1"],
            e.found("epochs")["one_batch_of_four"]["test_accuracy"] > 0.3,
        ),
        "that code takes one step on four pictures: it draws the network nearly as it began",
    ),
    Claim(
        "bonus: more convolutions, maps after each",
        "S3",
        "card `deep`; [atlas](experiments.md#atlas)",
        HOLDS,
        lambda e: (len(e.card("deep")["network"]["layers"]) == 7, len(e.found("atlas")["layers"]) == 7),
    ),
    Claim(
        "`cifar`: 3×32×32, 16×32×32, 16×16×16, 32×16×16, 8192, 10",
        "S4",
        "[stages](experiments.md#stages)",
        HOLDS,
        lambda e: (e.shapes_hold("cifar"),),
    ),
    Claim(
        "the ReLU sets negatives to 0, and keeps only useful signals",
        "S4",
        "[relu](experiments.md#relu)",
        PARTLY,
        lambda e: (
            e.found("relu")["distance"]["without ReLU"] < 1e-4 < e.found("relu")["distance"]["with ReLU"],
            e.found("relu")["below_0"]["cifar, trained"]["mean"] > 0.2,
            e.found("relu")["parts"]["trained"]["dropped"]["high"] < 0.2,
        ),
        "what it drops tells the classes nearly as well as what it keeps: 0.50 and 0.52 (n = 1,000)",
    ),
    Claim(
        "the second convolution finds more complex features",
        "S4",
        "[atlas](experiments.md#atlas), [combining](experiments.md#combining)",
        PARTLY,
        lambda e: (
            e.found("atlas")["cifar"]["conv2"]["mean"] > e.found("atlas")["cifar"]["conv1"]["mean"] + 0.5,
            e.unexplained("cifar", "conv2")["low"] > e.unexplained("cifar", "conv1")["high"],
        ),
        "one linear filter leaves 0.77 of its maps unexplained, 0.50 of `conv1`; its channels are no more selective",
    ),
    Claim(
        "`cifar`: loss 0.50 and accuracy 0.83 after 5 epochs",
        "S4",
        "card `cifar`",
        FAILS,
        lambda e: (
            e.accuracy("cifar", "train") > 0.8,
            e.accuracy("cifar") > 0.8,
        ),
        "0.663 after 20 epochs with all training pictures (n = 8,000)",
    ),
    Claim(
        "`Conv2d(3, 16, kernel_size=3)`, spelled so",
        "S4 Q2",
        "[spelling](experiments.md#spelling)",
        HOLDS,
        lambda e: (
            outcome("nn.Conv2d(3, 16, kernel_size=3)", (3, 32, 32)) == "16×30×30",
            "Error" in outcome("nn.Conv2d(3, 16, kernel=3)", (3, 32, 32)),
            "Error" in outcome("nn.Conv2d(3, 16)", (3, 32, 32)),
        ),
    ),
    Claim(
        "`Conv2d(3, 6, 5)` on 32×32 gives 28×28",
        "S4 Q3",
        "arithmetic",
        HOLDS,
        lambda e: (outcome("nn.Conv2d(3, 6, 5)", (3, 32, 32)) == "6×28×28",),
    ),
    Claim(
        "stride 2 and padding 3 on 28×28: an error, or a larger output",
        "S4 Q4",
        "[spelling](experiments.md#spelling)",
        FAILS,
        lambda e: (
            "Error" in outcome("nn.Conv2d(3, 16, 3, stride=2, padding=3)", (3, 28, 28)),
            side(28, 3, stride=2, padding=3) > 28,
        ),
        "16×16, without an error",
    ),
    Claim(
        "a 5×5 kernel keeps the size with padding 2: (k - 1) / 2",
        "S4 Q5",
        "arithmetic",
        HOLDS,
        lambda e: [side(28, k, padding=(k - 1) // 2) == 28 for k in (1, 3, 5, 7)],
    ),
)


def digit_kernels(evidence: Evidence) -> Tensor:
    """Return the kernels of the served `digits`, (16, 1, 3, 3)."""
    network: Any = service.trained(evidence.root / "model_store", "digits")
    weights: Tensor = network.conv1.weight.detach()
    return weights


def check(root: Path) -> list[str]:
    """Return the claims whose verdict is not what the evidence gives, one line each."""
    evidence = Evidence(root)
    wrong = []
    for number, claim in enumerate(CLAIMS, 1):
        judged = claim.judged(evidence)
        if judged != claim.verdict:
            wrong.append(f"{number}. {claim.text}: {claim.verdict!r} is stated, the evidence says {judged!r}")
    return wrong


def page() -> str:
    """Return docs/claims.md."""
    counts = ", ".join(
        f"{sum(claim.verdict == verdict for claim in CLAIMS)} {label}"
        for verdict, label in (
            (HOLDS, "hold"),
            (PARTLY, "hold in part"),
            (FAILS, "do not hold"),
            (UNTESTED, "were not tested"),
        )
    )
    rows = [
        (number, claim.text, claim.where, claim.shown or "–", f"**{claim.verdict}**", claim.note)
        for number, claim in enumerate(CLAIMS, 1)
    ]
    return f"""# What the documents claim, and what was found

Every claim, number and exercise of the five documents that these networks come from: S0 the digit pipeline, S1 why CNNs
detect spatial patterns, S2 the edge filter and the basics, S3 two convolutions on CIFAR-10, S4 the wider pipeline. Of
{len(CLAIMS)}, {counts}.

A claim has one or several parts. It **holds** if all are shown, holds **in part** if some are, and **does not hold** if
none is: the evidence contradicts it, or does not show it (*why* says which).

`python -m experiments claims` computes each verdict from shapes, formulas, model cards and the figures of the
[experiments](experiments.md), fails if it differs from the one stated here, and writes this page.

{markdown(("", "claim", "where", "shown by", "verdict", "why"), rows)}
"""
