"""Makes transformers know the latent model types, without importing it.

`AutoModelForCTC` must load them as soon as asrlib has been imported, whichever of the two is imported first. The
classes to register inherit from transformers' own, and importing those takes seconds, torch included: too long for
`import asrlib`. transformers looks for no entry points, so they are registered right after its import instead,
whoever imports it. It must not be later: while one of its lazy submodules is being imported, the others that the
registration needs may be half there.
"""

import sys
from importlib import import_module
from pathlib import Path

WITHOUT_CLASSES = {
    "__init__",
    "families",
    "heads",
    "inference",
    "latent_twin",
    "new_whisper",
    "registration",
    "scratch",
    "transducer",
}
MODEL_MODULES = [  # the others here: each registers its classes when imported, or mends one of transformers'
    f"asrlib.models.{file.stem}"
    for file in sorted(Path(__file__).parent.glob("*.py"))
    if file.stem not in WITHOUT_CLASSES
]


class _AfterTransformers:
    """A finder for `sys.meta_path` that finds what the other finders find, with registration behind it."""

    def find_spec(self, name, path=None, target=None):
        if name != "transformers":
            return None
        others = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec and spec.loader:
            load = spec.loader.exec_module

            def load_and_register(module):
                load(module)
                _register()

            spec.loader.exec_module = load_and_register  # of this spec: finders make a loader for each
        return spec


def _register() -> None:
    for name in MODEL_MODULES:
        import_module(name)


def register_with_transformers() -> None:
    """At once where transformers is imported already, otherwise right after it will be."""
    if "transformers" in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterTransformers) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterTransformers())
