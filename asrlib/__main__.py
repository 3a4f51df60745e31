"""The commands of asrlib: python -m asrlib VERB …

Each verb is the `main` of one module, which raises what is wrong; here it becomes a sentence and an exit status.
"""

import signal
import sys
from dataclasses import dataclass
from importlib import import_module

from asrlib.running.command_line import sentence, tell
from asrlib.runs import BadParameter, nearest


@dataclass(frozen=True)
class Verb:
    module: str
    does: str
    interrupted: str = ""  # what becomes of the work when somebody stops it


RESUMES = "The same command, given again, resumes here."
VERBS = {
    "data": Verb("asrlib.data.prepare", "download LibriSpeech", RESUMES),
    "stream": Verb("asrlib.streaming.streams", "recognise a recording chunk by chunk"),
    "export": Verb("asrlib.export.exporting", "make a run's model usable elsewhere: hub, ONNX", "Nothing was kept."),
    "compare": Verb("asrlib.reporting.word_error_tables", "test whether two transcripts differ in word errors"),
    "methods": Verb("asrlib.reporting.method_tables", "measure every method of conversion at every cut"),
    "lengths": Verb("asrlib.measuring.lengths", "time full passes over audio of several lengths"),
    "steps": Verb("asrlib.measuring.stream_steps", "time a chunk of a stream, for kinds of attention"),
    "tokens": Verb("asrlib.measuring.writing", "time a token of a decoder, and count what it keeps"),
    "parameters": Verb("asrlib.running.parameter_table", "show every parameter of the notebooks"),
}


def help_text() -> str:
    lines = [f"  {name:<12}{verb.does}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            "usage: python -m asrlib VERB …",
            "",
            *lines,
            "",
            "python -m asrlib VERB --help shows the options of a verb; --debug shows where an error arose.",
            "Runs of the notebooks are started by run_all.py.",
            "",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done · 1 it failed, and why was said · 2 refused before any work · 130 interrupted."""
    words = sys.argv[1:] if argv is None else list(argv)
    name = words[0] if words else "--help"
    if name in ("-h", "--help"):
        sys.stdout.write(help_text())
        return 0
    if name not in VERBS:
        sys.stderr.write(f"there is no verb {name!r}{nearest(name, VERBS)}\n\n{help_text()}")
        return 2
    try:
        options = [word for word in words[1:] if word != "--debug"]
        return import_module(VERBS[name].module).main(options)
    except KeyboardInterrupt:
        sys.stderr.write(f"\nInterrupted. {VERBS[name].interrupted}".rstrip() + "\n")
        return 130
    except Exception as error:
        tell(sentence(error), error, "--debug" in words)
        return 2 if isinstance(error, BadParameter) else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a batch system's stop ends like Ctrl-C
    sys.exit(main())
