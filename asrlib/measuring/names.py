"""Names and limits that measurements and their reports share."""

ATTENTION = {"mha": "MHA", "mla": "MLA", "mla_simple": "MLA-simple", "gqa": "GQA", "linear": "linear"}
LATENT = ("mla", "mla_simple")
AUDIO_SECONDS = 30.0  # of the state that is compared: in it, one that never grows has a place beside those that do
SIGNIFICANT = 0.05  # p below it: a difference is more than chance
IN_BLOCKS = "MHA in blocks"  # a model with multi-head attention, computed by attention.relative
LONG_PASS = 5.0  # seconds: one such pass is enough, whatever disturbs it weighs little
PROFILED_AUDIO = 60.0  # seconds: the memory of longer audio is not worth another long pass, under the CPU's profiler


def encoder_named(model_type: str) -> str | None:
    """conformer, of wav2vec2-conformer and wav2vec2-conformer-mla."""
    return next((name for name in ("branchformer", "conformer") if name in model_type), None)
