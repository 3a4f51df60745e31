"""A copy of the project, where runs may write."""

import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A copy of what a run needs, so that the reports of the checkout stay as they are."""
    project = tmp_path_factory.mktemp("project")
    for name in ("notebooks", "params", "asrlib"):
        shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "run_all.py", project)
    return project
