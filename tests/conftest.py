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

LONGEST_FIRST = [  # else one process would work on one of these when the others are done
    "test_pipeline.py",
    "test_rehearsal.py",
    "test_new_and_writing_models.py",
    "test_estimate.py",
    "test_onnx.py",
    "test_distributed.py",
    "test_training.py",
    "test_sweeps.py",
]


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


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
