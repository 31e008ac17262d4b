"""A hub and a GitHub on this machine."""

import hub_mirror
import huggingface_hub
import pytest
from huggingface_hub import constants


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
    huggingface_hub.close_session()
