"""A judge on this machine, and a client that does not wait seconds between its retries."""

import judge_endpoint
import openai
import pytest


@pytest.fixture
def server():
    with judge_endpoint.Endpoint() as endpoint:
        yield endpoint


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Retries without the client's own pauses; what a server asks for is still waited."""
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.01)
