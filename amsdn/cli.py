"""The ``amsdn`` command: ``amsdn STAGE [RECIPE] --field value``.

Bad input ends in one line on stderr and exit code 2, an interrupted run in 128 + signal, any other failure
that AMSDN foresees (a loss that diverges, another process of the run that died, a certificate that an attack refutes) in 1.
"""

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from amsdn import __version__
from amsdn.errors import InputError

COMMANDS = {
    "demo": "everything once on digits: train, attack, certify, report (minutes on a CPU)",
    "pretrain": "stage one: self-supervised robustness pretraining",
    "train": "stage two: adversarial training",
    "finetune": "stage three: fine-tuning against several attacks",
    "attack": "run one attack against a model and keep the attacked images",
    "patch": "learn one patch for all images, judge it on unseen ones, and print it",
    "evaluate": "clean and robust accuracy, detection, per-image worst case",
    "certify": "certificates against L2 changes, patches and few pixels, cross-checked by attacks",
    "predict": "classify image files and show where they look attacked",
    "compare": "two evaluated runs image by image: which differences are shown",
    "report": "one page from one or more evaluated runs",
}

USAGE = """usage: amsdn COMMAND [RECIPE or ATTACK] [--field value ...]

{commands}

Each command explains itself: amsdn train --help
Recipes:  amsdn train digits-demo,  amsdn train cifar10-cpu --data-root DIR
A look:   amsdn evaluate --data cifar10 --limit 200 --model checkpoints/cifar10-cpu/finetune/model
Numbers may be fractions: --attack.epsilon 8/255
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if args else 2
    if args[0] == "--version":
        print(f"amsdn {__version__}")
        return 0
    name, rest = args[0], args[1:]
    sys.argv = ["amsdn", *args]  # what provenance records, however the command was started
    if name not in COMMANDS:
        print(f"amsdn: unknown command {name!r}; choose one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return _guarded(name, rest)


def usage() -> str:
    """The text of ``amsdn --help``."""
    return USAGE.format(commands="\n".join(f"  {name:<9} {about}" for name, about in COMMANDS.items()))


def _guarded(name: str, args: Sequence[str]) -> int:
    """Run a command; every foreseen failure becomes one line on stderr and its exit code."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # tensorboard's optional TensorFlow is chatty where it is installed
    module: Any = importlib.import_module(f"amsdn.commands.{name}")
    from amsdn.evaluation.crosscheck import CertificateViolation
    from amsdn.training.loop import Interrupted, ProcessGone, TrainingDiverged
    from amsdn.utils.helpers import keep_freed_memory

    keep_freed_memory()
    try:
        module.run(args)
    except SystemExit as e:  # a help text was asked for and printed
        return int(e.code or 0)
    except InputError as e:
        return _fail(name, e, 2)
    except BrokenPipeError:  # the reader of our output, such as head, has had enough
        sys.stdout = None  # type: ignore[assignment]
        return 0
    except OSError as e:  # a full disk, a read-only folder, a file that vanished
        where = f"{e.filename}: " if e.filename else ""
        return _fail(name, f"{where}{e.strerror or e}; check the path, its permissions and the free space", 2)
    except Interrupted as e:
        return _fail(name, e, 128 + e.signal_number)
    except KeyboardInterrupt:
        return _fail(name, "interrupted; start the same command again to go on", 130)
    except (TrainingDiverged, ProcessGone, CertificateViolation) as e:
        return _fail(name, e, 1)
    return 0


def _fail(name: str, message: object, code: int) -> int:
    line = " ".join(str(message).split()).removeprefix(f"{name}: ")  # a stage's own messages begin with its name
    print(f"amsdn {name}: {line}", file=sys.stderr)
    return code
