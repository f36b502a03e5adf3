"""The timing of a request."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Timing:
    """Where the time of a request went, in seconds; for all pictures of the request together.

    The stages need not add up to `handler_s`: the rest went to the requests that shared the batch.

    Attributes:
        read_s: Reading the body and its options.
        decode_s: From picture files to pixels of the network's size.
        preprocess_s: Normalising and stacking.
        forward_s: The forward passes that this request took part in.
        encode_s: Selecting, pooling and converting maps, and writing the reply.
        handler_s: From the worker receiving the batch to the reply being ready.
        batch_requests: Requests in that batch.
        total_s: Measured here, from sending the request to having read the reply: of the attempt that was answered,
            without those before it.
    """

    read_s: float
    decode_s: float
    preprocess_s: float
    forward_s: float
    encode_s: float
    handler_s: float
    batch_requests: int
    total_s: float

    @property
    def outside_s(self) -> float:
        """Seconds outside the worker: the network, the gateway, waiting for a worker, and this client."""
        return self.total_s - self.handler_s
