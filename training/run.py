"""A training run: a network, its data and its progress; it can be interrupted after any epoch."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from handlers.images.preprocessing import Preprocessing
from handlers.networks import NETWORKS
from training import checkpoint as checkpoints
from training import machine
from training.checkpoint import Checkpoint
from training.corpus import Corpus
from training.errors import CheckpointError
from training.history import Epoch
from training.loop import evaluate, train_epoch
from training.recipes import Recipe


@dataclass(frozen=True)
class Plan:
    """Everything that decides a run's result, apart from its pictures.

    Attributes:
        model: Name of the network.
        recipe: How it is trained.
        seed: Seed of the first weights and of the order of the pictures.
    """

    model: str
    recipe: Recipe
    seed: int

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Plan:
        """Return the plan that a checkpoint's run followed.

        Raises:
            CheckpointError: The checkpoint's network is not trained.
        """
        if "plan" not in checkpoint:
            raise CheckpointError(f"the checkpoint of {checkpoint['model']} holds no training to go on with")
        return cls(checkpoint["model"], Recipe(**checkpoint["plan"]["recipe"]), checkpoint["plan"]["seed"])


class Run:
    """One network in training.

    The same plan, pictures, number of threads and versions give the same weights, bit for bit, whether or not the run
    was put down and resumed in between. (A plan whose epochs are changed on resuming is another plan.)

    Args:
        plan: The network and how to train it.
        corpus: Pictures to train on.
        device: Device to compute on.

    Raises:
        DataError: The network does not take these pictures.
    """

    def __init__(self, plan: Plan, corpus: Corpus, device: torch.device) -> None:
        self.plan = plan
        self.device = device
        self.history: list[Epoch] = []
        self.corpus = corpus
        self.preprocessing = corpus.normalised(input_of(plan.model))
        self._digest = corpus.digest()
        self._train, self._test = corpus.train.to(device), corpus.test.to(device)
        torch.manual_seed(plan.seed)
        self.model = NETWORKS[plan.model](**{"classes": len(corpus.classes)}).to(device)
        if plan.recipe.bfloat16:
            self.model.to(memory_format=torch.channels_last)
        self._optimizer = plan.recipe.optimizer(self.model.parameters())
        self._draw = torch.Generator().manual_seed(plan.seed)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Restore the state of a checkpoint of the same plan and pictures.

        Raises:
            CheckpointError: It was written by another run, or with other pictures.
        """
        former = Plan.of(checkpoint)
        if replace(former, recipe=replace(former.recipe, epochs=self.plan.recipe.epochs)) != self.plan:
            raise CheckpointError(f"the checkpoint is of another run: {former}, not {self.plan}")
        if checkpoint["plan"]["data_sha256"] != self._digest:
            raise CheckpointError(
                f"the checkpoint was trained on other pictures ({checkpoint['training']['data']!r}, "
                f"{checkpoint['training']['train_pictures']:,} to learn from) than {self.corpus.name!r} holds now"
            )
        self.model.load_state_dict(checkpoint["state_dict"])
        self._optimizer.load_state_dict(checkpoint["optimizer"])
        self._draw.set_state(checkpoint["rng"]["draw"])
        torch.set_rng_state(checkpoint["rng"]["cpu"])
        if self.device.type == "cuda" and "cuda" in checkpoint["rng"]:
            torch.cuda.set_rng_state(checkpoint["rng"]["cuda"], self.device)
        self.history = [Epoch(**values) for values in checkpoint["training"]["history"]]

    @property
    def done(self) -> bool:
        """Whether all planned epochs are done."""
        return len(self.history) >= self.plan.recipe.epochs

    def advance(self) -> Epoch:
        """Train one more epoch, measure, and return the figures."""
        started = time.perf_counter()
        number = len(self.history) + 1
        train = train_epoch(
            self.model,
            self._train,
            self.preprocessing,
            self._optimizer,
            recipe=self.plan.recipe,
            epoch=number,
            draw=self._draw,
        )
        test = evaluate(self.model, self._test, self.preprocessing)
        seconds = round(time.perf_counter() - started, 3)
        self.history.append(Epoch(number, train.loss, train.accuracy, test.loss, test.accuracy, seconds))
        return self.history[-1]

    def checkpoint(self) -> Checkpoint:
        """Return the state after the last epoch.

        `training.train_accuracy` is measured on all training pictures with the final weights, so it is there (not
        None) once all planned epochs are done; the history's is a mean over each epoch while it went on.
        """
        last = self.history[-1]
        train = evaluate(self.model, self._train, self.preprocessing).accuracy if self.done else None
        training: dict[str, Any] = {
            "data": self.corpus.name,
            "train_pictures": len(self.corpus.train),
            "test_pictures": len(self.corpus.test),
            "epochs": last.epoch,
            "seed": self.plan.seed,
            "history": [asdict(epoch) for epoch in self.history],
            "train_accuracy": train,
            "test_accuracy": last.test_accuracy,
            "seconds": round(sum(epoch.seconds for epoch in self.history), 3),
            "machine": machine.describe(self.device),
            "versions": machine.versions(),
        }
        described = checkpoints.describe(self.plan.model, self.model, self.preprocessing, self.corpus.classes, training)
        rng = {"draw": self._draw.get_state(), "cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        plan = {
            "recipe": asdict(self.plan.recipe),
            "seed": self.plan.seed,
            "data_sha256": self._digest,
            "device": self.device.type,
            "threads": torch.get_num_threads(),
        }
        return {**described, "optimizer": self._optimizer.state_dict(), "rng": rng, "plan": plan}


def input_of(model: str) -> Preprocessing:
    """Return a network's preprocessing, without a normalisation."""
    channels, height, width = NETWORKS[model].pictures
    return Preprocessing(channels, height, width)


def hand_set(model: str) -> Checkpoint:
    """Return the checkpoint of a network that has nothing to train."""
    network = NETWORKS[model]()
    training = {
        "data": "none: its weights are set by hand",
        "train_pictures": 0,
        "test_pictures": 0,
        "epochs": 0,
        "seed": 0,
        "history": [],
        "train_accuracy": None,
        "test_accuracy": None,
        "seconds": 0.0,
        "machine": machine.describe(torch.device("cpu")),
        "versions": machine.versions(),
    }
    return checkpoints.describe(model, network, input_of(model), (), training)
