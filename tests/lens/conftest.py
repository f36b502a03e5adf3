"""The fixtures of the client's tests: a server that speaks the contract, and its URL."""

from __future__ import annotations

from tests.client.conftest import clean_environment, client, stand_in, url

__all__ = ["clean_environment", "client", "stand_in", "url"]
