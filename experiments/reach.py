"""A task that needs reach: are two marks, d pixels apart, of the same sign?

A picture holds two pairs of marks of +1 and -1, far from each other: both pairs of the same sign, or both of different
signs. Every picture has two marks of each sign, so single marks look the same in both classes. The
picture's edges meet (circular), so places say nothing either. A network that averages its last map over all places can
tell the classes only if one cell sees two marks at once: if d is less than its receptive field.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from experiments import service
from experiments.experiment import Figures, Result, Setting, markdown, plot
from experiments.learning import INPUT, files, pixels
from handlers.images.preprocessing import normalise

SIDE = 32
CHANNELS = 8
BATCH = 8  # Places say nothing, so there are four kinds of pictures only.
RATE = 0.01
LEARNED = 0.995  # Accuracy on 100 pictures that are neither learned from nor counted, at which training ends early.
PLAIN, DILATED = (1, 1, 1), (1, 2, 4)
DISTANCES: dict[tuple[int, int, int], tuple[int, ...]] = {PLAIN: (2, 4, 6, 7, 8), DILATED: (6, 8, 14, 15, 16)}


class Window(nn.Module):
    """Three 3×3 convolutions of some dilations on a picture whose edges meet; the sum of each channel decides."""

    def __init__(self, dilations: Sequence[int], channels: int = CHANNELS) -> None:
        super().__init__()
        self.reach = sum(dilations)
        layers: list[nn.Module] = []
        for place, dilation in enumerate(dilations):
            # Without a bias the ground stays at 0, where the ReLU bends: what two marks make is not the sum of what
            # each makes. With torch's first biases most cells would be linear, and training stays where it begins.
            conv = nn.Conv2d(channels if place else 1, channels, 3, dilation=dilation, bias=False)
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            layers += [conv, nn.ReLU()]
        self.maps = nn.Sequential(*layers)
        self.norm = nn.BatchNorm1d(channels)
        self.fc = nn.Linear(channels, 2)

    @property
    def field(self) -> int:
        """Side of the receptive field, in pixels."""
        return 2 * self.reach + 1

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, 2) of pictures (N, 1, H, W), float32."""
        logits: Tensor = self.fc(self.norm(self.sums(images)))
        return logits

    def sums(self, images: Tensor) -> Tensor:
        """Return each channel's sum, its mean times the number of cells, (N, C): all that the decision knows."""
        maps: Tensor = self.maps(pad(images, (self.reach,) * 4, mode="circular"))  # (N, C, H, W)
        return maps.sum((2, 3))


def draw(count: int, distance: int, generator: torch.Generator, side: int = SIDE) -> tuple[Tensor, Tensor]:
    """Return pictures with two pairs of marks.

    Args:
        count: N.
        distance: From one mark of a pair to the other, along the row.
        generator: Generator of the places and signs.
        side: Side of the pictures. The second pair is side / 2 rows below the first.

    Returns:
        Pictures (N, 1, side, side), float32, -1, 0 or 1; and 1 where the marks of a pair differ in sign, else 0, (N,).
    """
    differs = torch.randint(0, 2, (count,), generator=generator)
    sign = 2 * torch.randint(0, 2, (count,), generator=generator) - 1
    row = torch.randint(0, side, (count,), generator=generator)
    images, numbers = torch.zeros(count, 1, side, side), torch.arange(count)
    for pair in (0, 1):
        column = torch.randint(0, side, (count,), generator=generator)
        first = sign * (1 - 2 * pair)  # The second pair has the other signs.
        rows = (row + pair * side // 2) % side
        images[numbers, 0, rows, column] = first.float()
        images[numbers, 0, rows, (column + distance) % side] = (first * (1 - 2 * differs)).float()
    return images, differs


def learn(model: nn.Module, distance: int, seed: int, steps: int, side: int = SIDE, tested: int = 500) -> float:
    """Train a network on fresh pictures, and return its accuracy on others, 0..1."""
    generator = torch.Generator().manual_seed(seed)
    watched = draw(100, distance, torch.Generator().manual_seed(10_000 + seed), side)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    for step in range(1, steps + 1):
        images, labels = draw(BATCH, distance, generator, side)
        loss = cross_entropy(model.train()(images), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step % 20 == 0 and accuracy(model, *watched) >= LEARNED:
            break
    return accuracy(model, *draw(tested, distance, torch.Generator().manual_seed(20_000 + seed), side))


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of right answers, 0..1."""
    model.eval()
    answers = torch.cat([model(some).argmax(1) for some in torch.split(images, 250)])
    return float((answers == labels).double().mean())


def effective(model: nn.Module, module: str, cell: tuple[int, int], box: Sequence[int], images: Tensor) -> float:
    """Return the side of the square, about the middle of a receptive field, with 95 % of a cell's gradient, in pixels.

    The gradient is that of the sum of the cell over the channels; its size is summed over colours, and its mean over
    pictures is taken.

    Args:
        model: The network, in evaluation mode.
        module: Path of the module whose output is the map.
        cell: Row and column in the map.
        box: (top, left, bottom, right) of the cell's receptive field, in pixels.
        images: (N, C, H, W), normalised.
    """
    kept: list[Tensor] = []
    hook = model.get_submodule(module).register_forward_hook(lambda _module, _inputs, maps: kept.append(maps))
    size = torch.zeros(images.shape[2:])  # (H, W)
    try:
        for some in torch.split(images, 50):
            watched = some.clone().requires_grad_()
            model(watched)
            [slope] = torch.autograd.grad(kept.pop()[:, :, cell[0], cell[1]].sum(), watched)
            size += slope.abs().sum((0, 1)) / len(images)
    finally:
        hook.remove()
    rows, columns = (torch.arange(length, dtype=torch.float32) for length in size.shape)
    down, aside = rows - (box[0] + box[2] - 1) / 2, columns - (box[1] + box[3] - 1) / 2
    away = torch.maximum(down.abs()[:, None], aside.abs()[None, :]).flatten()
    order = away.argsort()
    inside = size.flatten()[order].cumsum(0) >= 0.95 * size.sum()
    return 2 * float(away[order][int(inside.int().argmax())]) + 1


def run(setting: Setting) -> Result:
    """Train both networks at every distance, and measure the effective field of a served one."""
    tasks = []
    small: dict[tuple[int, int, int], tuple[int, ...]] = {PLAIN: (6, 8)}
    for dilations, distances in setting.size(DISTANCES, small).items():
        for distance in distances:
            found = []
            for seed in range(setting.size(3, 1)):
                torch.manual_seed(seed)
                model = Window(dilations)
                steps, side = setting.size((300, SIDE), (200, SIDE // 2))
                found.append(round(learn(model, distance, seed, steps, side, setting.size(500, 300)), 4))
            tasks.append(
                {
                    "dilations": list(dilations),
                    "field": model.field,
                    "distance": distance,
                    "in_reach": distance < model.field,
                    "parameters": sum(weights.numel() for weights in model.parameters()),
                    "accuracy": found,
                }
            )
    figures: Figures = {"tasks": tasks, "tested": setting.size(500, 300), "fields": _fields(setting)}
    return Result(figures, _drawn(figures))


def _fields(setting: Setting) -> list[Figures]:
    """Return the stated and the effective receptive field of each block of `deep`, trained and untrained."""
    known = {"trained": service.trained(setting.store, "deep"), "untrained": service.first_weights("deep")}
    chosen = files(setting.pictures, "test", setting.size(50, 1))
    images = torch.stack([torch.from_numpy(pixels(path).copy()).permute(2, 0, 1) for path, _ in chosen])
    images = normalise(images, INPUT)
    with setting.client("deep") as client:
        layers = client.model_card("deep").layers
    fields = []
    for layer in layers:
        cell = layer.shape[1] // 2, layer.shape[2] // 2
        box = layer.receptive_field_box(*cell)
        found: Figures = {"layer": layer.name, "stated": box[2] - box[0], "pictures": len(images)}
        for name, model in known.items():
            found[name] = effective(model, f"{layer.name}.relu", cell, box, images)
        fields.append(found)
    return fields


def table(figures: Figures) -> str:
    """Return the tables."""
    rows = [
        (
            "plain" if task["dilations"] == list(PLAIN) else "dilated 1, 2, 4",
            task["field"],
            task["distance"],
            "yes" if task["in_reach"] else "no",
            ", ".join(f"{value:.2f}" for value in task["accuracy"]),
        )
        for task in figures["tasks"]
    ]
    fields = [(one["layer"], one["stated"], one["trained"], one["untrained"]) for one in figures["fields"]]
    return "\n\n".join(
        [
            markdown(("network", "receptive field", "d", "one cell sees both", "accuracy of each seed"), rows),
            markdown(("`deep`", "receptive field", "95 % of the gradient, trained", "untrained"), fields),
        ]
    )


def _drawn(figures: Figures) -> Figure:
    picture, [axes] = plot(6, 3)
    for dilations, colour in ((PLAIN, "#1f5fa8"), (DILATED, "#d1642f")):
        tasks = [task for task in figures["tasks"] if task["dilations"] == list(dilations)]
        if not tasks:
            continue
        label = f"receptive field {tasks[0]['field']}"
        points = [(task["distance"], value) for task in tasks for value in task["accuracy"]]
        axes.plot(*zip(*points, strict=True), "o", color=colour, label=label, alpha=0.6)
        axes.axvline(tasks[0]["field"] - 0.5, color=colour, linestyle=":")
    axes.axhline(0.5, color="0.5", linewidth=1)
    axes.set_xlabel("distance of the two marks (pixels)")
    axes.set_ylabel("accuracy")
    axes.set_ylim(0.4, 1.03)
    axes.legend(loc="center left")
    return picture
