"""Fine-tuning and training, in one process or several."""

from importlib.util import find_spec

if find_spec("accelerate") is None:
    raise ImportError('training needs accelerate: pip install "asrlib[notebooks]"')
