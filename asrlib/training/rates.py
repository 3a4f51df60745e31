"""The learning rate by a short search."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from asrlib.training.launching import TrainingFailed, train_in_processes
from asrlib.training.training import TrainingSettings

SHARE = 0.2  # of the epochs, for each rate


def try_learning_rates(
    rates: Sequence[float],
    model,
    processor,
    training,
    validation,
    folder: str | Path,
    settings: TrainingSettings,
    teacher=None,
    **where,
) -> list[dict]:
    """A fifth of a training at each rate, with its own warmup and decay, from the weights that `model` has and keeps:
    {learning_rate, eval_wer, eval_loss} on validation at its end, the best by `settings.chosen_by` first.

    A rate whose loss is not finite comes last, with None. `where`: see `train_in_processes`. Trials that are done are
    not repeated in the same `folder`. Raises what `train` raises, and FloatingPointError where every rate is too high.
    """
    start = {name: values.detach().cpu().clone() for name, values in model.state_dict().items()}
    order = ("eval_wer", "eval_loss") if settings.chosen_by == "wer" else ("eval_loss", "eval_wer")
    tried, unknown = [], dict.fromkeys(order)
    for rate in rates:
        short = replace(settings, learning_rate=rate, epochs=SHARE * settings.epochs, evaluations_per_epoch=1)
        where_to = Path(folder) / f"rate-{rate:g}"
        try:
            result = train_in_processes(model, processor, training, validation, where_to, short, teacher, **where)
            found = [row for row in result.history if "eval_wer" in row][-1]  # at the end, be the start better or not
        except (FloatingPointError, TrainingFailed) as error:
            if isinstance(error, TrainingFailed) and error.kind != FloatingPointError.__name__:
                raise
            found = unknown
        tried.append({"learning_rate": rate} | {name: found[name] for name in order})
        model.load_state_dict(start)
    broken = [row for row in tried if row[order[0]] is None]
    if len(broken) == len(tried):
        raise FloatingPointError(f"the loss is not finite at any of {list(rates)}: give lower learning_rates")
    return sorted((row for row in tried if row not in broken), key=lambda row: [row[name] for name in order]) + broken
