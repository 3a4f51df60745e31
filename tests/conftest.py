import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of subprocesses; tests run one process a core
if os.environ.pop("PYTHONDONTWRITEBYTECODE", ""):  # each would compile torch again, for longer than it works
    os.environ["PYTHONPYCACHEPREFIX"] = str(Path(__file__).parents[1] / ".pytest_cache" / "bytecode")

import pytest
import tiny
import torch
from browser import browser, open_page, playwright  # noqa: F401 fixtures

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
