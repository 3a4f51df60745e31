import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of subprocesses; tests run one process a core

import pytest
import tiny
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def processor():
    from asrlib.models.scratch import new_processor

    return new_processor()


@pytest.fixture
def tiny_model():
    return tiny.conformer()


@pytest.fixture
def asrlib_cache(tmp_path, monkeypatch):
    """An empty cache folder instead of the user's own."""
    monkeypatch.setenv("ASRLIB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
