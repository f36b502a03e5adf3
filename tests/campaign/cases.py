"""What the campaign sends, from a seed, and what may come back.

Five kinds of request: good ones, whose answer is known; questions made from the contract, odd values included, in every
carrier; the same, damaged; picture files that were built to hurt; and what TorchServe takes beside the contract.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from tests.campaign.wire import GrpcRequest, Outcome, RestRequest
from tests.contract.requests import CARRIERS, Ask, Sent, generate, twist, write
from tests.foreign import HUNG_UP, Call, Target, grpc_call, predictions_request, rest_call
from tests.hostile import endless
from tests.pictures import colours, npy, png

STATUS = {
    **dict.fromkeys(("bad_request", "unknown_layer", "bad_image", "wrong_channels"), "400"),
    **dict.fromkeys(("image_too_large", "too_many_images", "reply_too_large"), "413"),
}
OWN_WORDS = ("404", "405", "413", "400", "NOT_FOUND", "INTERNAL", "CANCELLED")  # TorchServe's, or the gateway's.
LAYERS = {"cifar": ("conv1", "conv2"), "digits": ("conv1",)}
GOOD = {"cifar": [png(colours(seed)) for seed in range(8)] + [npy(colours(seed)) for seed in range(4)]}
GOOD["digits"] = GOOD["cifar"][:8] + [npy(colours(seed)[..., :1].copy()) for seed in range(4)]

SHARES = {"good": 43, "contract": 28, "damaged": 12, "hostile picture": 12, "foreign": 3, "left": 2}
"""Of a hundred requests, how many of each kind."""


@dataclass(frozen=True)
class Case:
    """One request of the campaign.

    Attributes:
        kind: What it is, as the summary names it.
        model: Who is asked.
        request: What is sent; a `Call` sends itself.
        expected: The most probable class of each picture, where that is known.
    """

    kind: str
    model: str
    request: RestRequest | GrpcRequest | Call
    expected: tuple[int, ...] = ()

    def judge(self, outcome: Outcome) -> str | None:
        """Return why an outcome is a failure; None for one that is right."""
        status, code = outcome.status, outcome.code
        if status in ("hung up", "cancelled") or isinstance(self.request, Call):
            return None if not status.startswith("broken") else status
        if not outcome.is_answer:
            return status
        if code in ("internal", "draining", "undecodable") or status in ("500", "503", "507", "UNAVAILABLE", "UNKNOWN"):
            return f"{status} {code}: {outcome.body[:300]!r}"
        if self.expected:
            if code != "ok":
                return f"a good request got {status} {code}: {outcome.body[:300]!r}"
            if outcome.top and outcome.top != list(self.expected):
                return f"the most probable classes are {outcome.top}, not {list(self.expected)}"
            return None
        if code in STATUS:
            right = {"OK"} if isinstance(self.request, GrpcRequest) else {STATUS[code]}
            return None if status in right else f"{code} came with status {status}"
        return None if code == "ok" or status in OWN_WORDS else f"{status} {code}: {outcome.body[:300]!r}"


class Generator:
    """Makes cases without end.

    Args:
        seed: Of its choices.
        expected: The most probable class of each file of `GOOD`, by model.
        targets: A server without a gateway, by model; empty behind a gateway, which lets nothing foreign through.
    """

    def __init__(self, seed: int, expected: dict[str, list[int]], targets: dict[str, Target]) -> None:
        self._chance = random.Random(seed)
        self._expected = expected
        self._targets = targets
        self._models = sorted(expected)
        self._files = endless(seed)
        shares = {kind: share for kind, share in SHARES.items() if kind != "foreign" or targets}
        self._kinds, self._weights = list(shares), list(shares.values())
        self._makers: dict[str, Callable[[str], Case]] = {
            "good": self._good,
            "contract": self._contract,
            "damaged": self._damaged,
            "hostile picture": self._hostile,
            "foreign": self._foreign,
            "left": self._left,
        }

    def next(self) -> Case:
        """Return the next case."""
        [kind] = self._chance.choices(self._kinds, self._weights)
        return self._makers[kind](self._chance.choice(self._models))

    def _good(self, model: str) -> Case:
        places = [
            self._chance.randrange(len(GOOD[model])) for _ in range(self._chance.choice((1, 1, 1, 1, 1, 1, 2, 4)))
        ]
        fields = {}
        if self._chance.random() < 0.5:
            fields["layers"] = self._chance.choice((list(LAYERS[model]), [LAYERS[model][0]], ["all"]))
            fields["map_dtype"] = self._chance.choice(("float32", "float16", "uint8"))
        if self._chance.random() < 0.2:
            fields["pool"] = self._chance.choice((1, 2, 7))
        if self._chance.random() < 0.2:
            fields["top_k"] = self._chance.choice((1, 3, 0))
        if self._chance.random() < 0.03:
            fields["explain"] = self._chance.choice(
                ("grad_cam", "input_gradient", {"method": "occlusion", "window": 16})
            )
        if self._chance.random() < 0.5:
            fields["accept"] = self._chance.choice(("application/json", "application/x-protobuf", "application/x-npz"))
        ask = Ask(tuple(GOOD[model][place] for place in places), fields)
        sent, carrier = self._write(ask)
        answers = tuple(self._expected[model][place] for place in places)
        return Case(f"good, {carrier}", model, self._request(sent, model), answers)

    def _contract(self, model: str) -> Case:
        sent, carrier = self._write(generate(self._chance.getrandbits(48), LAYERS[model]))
        return Case(f"contract, {carrier}", model, self._request(sent, model))

    def _damaged(self, model: str) -> Case:
        sent, carrier = self._write(generate(self._chance.getrandbits(48), LAYERS[model]))
        return Case(f"damaged, {carrier}", model, self._request(twist(sent, self._chance.getrandbits(48)), model))

    def _hostile(self, model: str) -> Case:
        name, file = next(self._files)
        pictures = [file]
        if self._chance.random() < 0.3:  # In good company, which must not suffer.
            pictures.insert(self._chance.randrange(2), GOOD[model][0])
        sent, _ = self._write(Ask(tuple(pictures)))
        return Case(f"hostile picture, {name.split()[0]}", model, self._request(sent, model))

    def _foreign(self, model: str) -> Case:
        make = self._chance.choice((rest_call, grpc_call))
        call = make(self._chance, self._targets[model])
        return Case(f"foreign, {make.__name__.removesuffix('_call')}", model, call)

    def _left(self, model: str) -> Case:
        case = self._good(model)
        if isinstance(case.request, GrpcRequest):
            after_s = self._chance.choice((0.0001, 0.001, 0.003, 0.01))
            return replace(case, kind="left, gRPC", request=replace(case.request, cancel_after_s=after_s), expected=())
        assert isinstance(case.request, RestRequest)
        size = len(case.request.body) + 200
        request = replace(case.request, hang_up_after=self._chance.choice((1, size // 2, size - 1, 10 * size)))
        return replace(case, kind="left, REST", request=request, expected=())

    def _write(self, ask: Ask) -> tuple[Sent, str]:
        """Write a question in a carrier that can say it."""
        while True:
            carrier = self._chance.choice(list(CARRIERS))
            sent = write(ask, carrier)
            if sent is not None:
                return sent, carrier
            if self._chance.random() < 0.02:  # None can: then only the pictures.
                ask = Ask(ask.pictures or (GOOD["cifar"][0],))

    def _request(self, sent: Sent, model: str) -> RestRequest | GrpcRequest:
        if sent.inputs is not None:
            return GrpcRequest(
                predictions_request(model, {name.encode(): value for name, value in sent.inputs.items()})
            )
        headers = tuple((name, value) for name, value in sent.headers if value or name != "Content-Type")
        return RestRequest(sent.method, sent.target(model), headers, sent.body)


def send_foreign(call: Call) -> Outcome:
    """Send what sends itself."""
    try:
        status = call.send()
    except AssertionError as error:
        return Outcome(f"broken: {error}")
    return Outcome("hung up" if status == HUNG_UP else f"answer {status.split()[0]}")
