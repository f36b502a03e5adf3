"""Networks that are rejected because an answer depends on more than the picture."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from archiver import packing
from archiver.graph import export
from archiver.packing import ArchiveError
from archiver.proof import (
    check_batch_independence,
    check_graph,
    check_mode,
    check_rebuilt,
    check_steady,
    why_no_gradients,
)
from archiver.survey import Survey, check_scores, survey
from archiver.trial import noise
from handlers.images.preprocessing import Preprocessing
from handlers.network.engines.torch_engine import TorchEngine
from handlers.networks import NETWORKS

PREPROCESSING = Preprocessing(3, 16, 16)
PICTURE = noise(PREPROCESSING)


class Net(nn.Module):
    """A convolution, and a head that a subclass may spoil."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(4, 3)

    def trunk(self, images: Tensor) -> Tensor:
        return self.relu(self.norm(self.conv(images)))

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.trunk(images).mean((2, 3)))


class OneRow(Net):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4 * 14 * 14, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.trunk(images).reshape(1, -1))


class OneRowForAll(Net):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).mean(0, keepdim=True)


class BatchMean(Net):
    def trunk(self, images: Tensor) -> Tensor:
        maps = super().trunk(images)
        return maps - maps.mean(0, keepdim=True)


class Rounds(Net):
    """Sums of large values whose mean a norm takes away: what is left is mostly the order in which they were added."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(768, 256)
        self.norm = nn.BatchNorm1d(256)
        with torch.no_grad():
            self.norm.running_mean.copy_(self.fc(torch.full((1, 768), 3e4))[0])  # type: ignore[union-attr]

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.fc(images.flatten(1) + 3e4))


class BatchLargest(Net):
    """Of two pictures of like noise the largest value is nearly the same."""

    def trunk(self, images: Tensor) -> Tensor:
        return super().trunk(images / images.amax())


class OnlyTheMap(Net):
    """Its scores are those of the picture, its map is not."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        maps = self.trunk(images)
        return self.fc(maps.mean((2, 3))) + 0 * self.seen(maps / maps.amax()).mean()


class Dropping(Net):
    """Random, and left random by eval(); most draws spare all three scores."""

    def forward(self, images: Tensor) -> Tensor:
        assert images.shape[1] == 3  # What cannot be traced.
        return functional.dropout(super().forward(images), 0.1, training=True)


class Counting(Net):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(images) + self.calls


class Training(Net):
    def eval(self) -> "Training":
        super().eval()
        self.norm.train()
        return self


class Masked(Net):
    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        maps = self.trunk(images)
        if mask is not None:
            maps = maps * mask
        return self.fc(maps.mean((2, 3)))


def in_torch(network: nn.Module, node: str = "relu", *, has_scores: bool = True) -> TorchEngine:
    return TorchEngine(network, {"conv1": node}, has_scores=has_scores)


@pytest.mark.parametrize("name", NETWORKS)
def test_our_own_networks_answer_a_picture_the_same_beside_another(name: str) -> None:
    torch.manual_seed(0)
    network = NETWORKS[name]()
    engine = TorchEngine(network, network.layers, has_scores=name != "edges")
    check_batch_independence(engine, Preprocessing(*network.pictures))


@pytest.mark.parametrize(
    ("network", "node", "message"),
    [
        pytest.param(OneRow, "relu", "fails for two pictures in one pass, though not for one", id="fails"),
        pytest.param(OneRowForAll, "relu", r"scores of shape \(1, 3\).*first axis", id="one row"),
        pytest.param(BatchMean, "relu", "depends on what else is in the batch: scores", id="mean"),
        pytest.param(BatchLargest, "relu", "depends on what else is in the batch: the maps of conv1", id="largest"),
        pytest.param(OnlyTheMap, "seen", "depends on what else is in the batch: the maps of conv1", id="map"),
    ],
)
def test_an_answer_that_depends_on_the_batch_is_refused(network: type[nn.Module], node: str, message: str) -> None:
    with pytest.raises(ArchiveError, match=message):
        check_batch_independence(in_torch(network(), node), PREPROCESSING)


def test_rounding_in_a_batch_of_another_size_is_no_dependence_on_it() -> None:
    engine = TorchEngine(Rounds(), {}, has_scores=True)
    pictures = noise(PREPROCESSING, 2)
    alone, together = (engine.forward(given)[0] for given in (pictures[:1], pictures))
    assert alone is not None
    assert together is not None
    assert (alone[0] - together[0]).abs().max() > 1e-3 * alone.abs().max(), "nothing to tell from a dependence"
    check_batch_independence(engine, PREPROCESSING)


def test_maps_are_compared_where_there_are_no_scores() -> None:
    with pytest.raises(ArchiveError, match="the maps of conv1"):
        check_batch_independence(in_torch(BatchLargest(), has_scores=False), PREPROCESSING)


class Infinite(Net):
    def trunk(self, images: Tensor) -> Tensor:
        return super().trunk(images).log()  # Of an activation of 0: -inf.

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.trunk(images).exp().mean((2, 3)))


def test_a_map_may_hold_what_is_not_finite_as_long_as_it_is_the_same() -> None:
    engine = in_torch(Infinite(), "log")
    assert engine.forward(PICTURE, frozenset(["conv1"]))[1]["conv1"].isinf().any()
    check_batch_independence(engine, PREPROCESSING)


@pytest.mark.parametrize("network", [Dropping, Counting])
def test_a_network_that_answers_the_same_picture_otherwise_is_refused(network: type[nn.Module]) -> None:
    with pytest.raises(ArchiveError, match="forward pass is random, or keeps something"):
        survey(network().eval(), PICTURE)


def test_the_random_numbers_of_the_process_are_left_alone() -> None:
    network = Dropping().eval()
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    with pytest.raises(ArchiveError):
        check_steady(network, PICTURE)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_what_stays_in_training_mode_is_named() -> None:
    with pytest.raises(ArchiveError, match=r"still in training mode after eval\(\).*: norm; let eval"):
        survey(Training().eval(), PICTURE)
    check_mode(Net().eval())


def test_outputs_of_any_structure_are_compared() -> None:
    class Several(Net):
        def forward(self, images: Tensor) -> dict[str, object]:
            return {"scores": super().forward(images), "more": (self.trunk(images), None)}

    network, other = Several().eval(), Several().eval()
    answer = check_steady(network, PICTURE)
    check_rebuilt(other, PICTURE, answer)
    with torch.no_grad():
        other.conv.bias += 1
    with pytest.raises(ArchiveError, match="built twice with the same weights"):
        check_rebuilt(other, PICTURE, answer)


def test_a_forward_pass_with_a_further_argument_is_refused_with_what_to_do() -> None:
    with pytest.raises(ArchiveError, match="wrap it so that forward takes the picture alone, without mask"):
        survey(Masked().eval(), PICTURE)


class UntracedUnderNoGrad(Net):
    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        assert images.shape[1] == 3  # What cannot be traced.
        return super().forward(images)


class TracedUnderNoGrad(Net):
    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images)


class OfIntegers(Net):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward((images * 100).long().float())


class OfTheIndex(Net):
    """What it computes goes through argmax, and its own numbers have gradients."""

    def forward(self, images: Tensor) -> Tensor:
        most = functional.one_hot(super().forward(images).argmax(1), 3).float()
        return most * torch.ones(3, requires_grad=True)


class Backwards(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, maps: Tensor) -> Tensor:
        return maps * 2

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        raise NotImplementedError("in /home/me")


class NoDerivative(Net):
    def forward(self, images: Tensor) -> Tensor:
        assert images.shape[1] == 3
        return Backwards.apply(super().forward(images))


@pytest.mark.parametrize(
    ("network", "why"),
    [
        (Net, ""),
        (TracedUnderNoGrad, ""),
        (UntracedUnderNoGrad, "runs without gradients"),
        (OfIntegers, "runs without gradients"),
        (OfTheIndex, "do not come from the picture"),
        (NoDerivative, "its backward pass fails with NotImplementedError"),
    ],
)
def test_why_there_are_no_gradients_is_found_out(network: type[nn.Module], why: str) -> None:
    said = why_no_gradients(in_torch(network().eval(), "relu"), PREPROCESSING)
    assert why in said
    assert bool(said) == bool(why)
    assert "/home" not in said


def test_scores_that_are_probabilities_are_refused_and_their_logarithms_are_not() -> None:
    logits = torch.tensor([[0.5, 2.0, -1.0]])
    with pytest.raises(ArchiveError, match="return the logits, before softmax"):
        check_scores(Survey(logits.softmax(1)), 3)
    for output in (logits, logits.log_softmax(1), logits.relu(), torch.zeros(1, 3), torch.tensor([[2.0, -0.5, -0.5]])):
        check_scores(Survey(output), 3)


def test_why_a_network_is_not_exported_is_one_plain_line() -> None:
    with pytest.raises(ArchiveError, match="the network cannot be exported: ") as caught:
        export(OneRow().eval(), {"conv1": "relu"}, PICTURE, weights=b"", has_scores=True, any_size=False)
    said = str(caught.value)
    assert "inconsistent" in said  # What torch says of the batch's axis, and not which step the exporter was at.
    assert "step 1" not in said
    assert "\n" not in said
    assert "\x1b" not in said


def test_a_graph_for_one_number_of_pictures_alone_is_refused() -> None:
    import onnx

    network = Net().eval()
    weights = packing.weights(network.state_dict())
    exported = export(network, {"conv1": "relu"}, PICTURE, weights=weights, has_scores=True, any_size=False)
    card = {"layers": {"conv1": "relu"}, "classes": ["a", "b", "c"]}
    check_graph(exported.content, weights, card, network, PREPROCESSING)
    graph = onnx.load_from_string(exported.content)
    graph.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2  # As many as it is first tried with.
    with pytest.raises(ArchiveError, match="the network fails for one picture of noise"):
        check_graph(graph.SerializeToString(), weights, card, network, PREPROCESSING)
