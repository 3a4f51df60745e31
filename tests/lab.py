"""JupyterLab on a copy of the notebooks, as its user would start it, for a browser to open."""

import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat
from playwright.sync_api import Page

ROOT = Path(__file__).resolve().parents[1]
OFFLINE = (  # JupyterLab asks for news, its newest release and the extensions there are
    "--LabApp.news_url=None",
    "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    "--LabApp.extension_manager=readonly",
)
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},  # cells out of sight are there, too
    "apputils-extension/notification": {"fetchNews": "false"},  # nor is its user asked about it
}
START_SECONDS = 60


@contextmanager
def jupyterlab(project: Path) -> Iterator[str]:
    """A server on `project`/notebooks; gives the address of a notebook, to be filled in: url.format("explore").

    It writes nothing outside of `project`, and listens on this machine alone.
    """
    own = project / "jupyter"
    for name, values in SETTINGS.items():
        file = own / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    folders = {name: str(own / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR")}
    folders |= {"JUPYTER_RUNTIME_DIR": str(own / "runtime"), "JUPYTERLAB_SETTINGS_DIR": str(own / "settings")}
    folders |= {"JUPYTERLAB_WORKSPACES_DIR": str(own / "workspaces")}
    token = secrets.token_hex(16)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--expose-app-in-browser"]
    command += ["--ServerApp.ip=127.0.0.1", "--ServerApp.port=0", f"--IdentityProvider.token={token}", *OFFLINE]
    command += [f"--ServerApp.root_dir={project / 'notebooks'}"]
    with open(own / "log", "wb") as log:
        server = subprocess.Popen(command, env=os.environ | folders, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield f"{_address(server, own)}lab/tree/{{}}.ipynb?token={token}"
    finally:
        server.terminate()  # its kernels too
        server.wait(30)


def _address(server: subprocess.Popen, own: Path) -> str:
    """Of the server, once it listens."""
    for _ in range(10 * START_SECONDS):
        for file in own.glob("runtime/jpserver-*.json"):
            return json.loads(file.read_text())["url"]
        if server.poll() is not None:
            break
        time.sleep(0.1)
    raise RuntimeError(f"JupyterLab did not start:\n{(own / 'log').read_text()}")


def run_all_cells(page: Page) -> None:
    """Of the notebook that is open; does not wait for them."""
    page.get_by_text("(ipykernel) | Idle").wait_for()  # before that it would ask which kernel to take
    page.evaluate("void jupyterapp.commands.execute('notebook:run-all-cells')")


def copied_notebook(project: Path, name: str, **parameters) -> None:
    """Notebook `name` in a folder that looks like the project, with other defaults in its parameters cell."""
    (project / "params").mkdir(parents=True, exist_ok=True)
    (project / "notebooks").mkdir(exist_ok=True)
    path = project / "notebooks" / f"{name}.ipynb"
    shutil.copy(ROOT / "notebooks" / path.name, path)
    notebook = nbformat.read(path, as_version=4)
    (cell,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    cell.source += "".join(f"\n{name} = {value!r}" for name, value in parameters.items())
    nbformat.write(notebook, path)
