"""A hub and a GitHub on this machine."""

import hub_mirror
import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.utils._http import default_client_factory


@pytest.fixture
def mirror(monkeypatch):
    """An empty server; a test fills its ``repos``."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4096)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    huggingface_hub.close_session()
    with hub_mirror.HubMirror() as server:
        yield server
    huggingface_hub.set_client_factory(default_client_factory)  # and ends the session
