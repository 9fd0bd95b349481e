"""What the benchmark scripts do alike when they are called: run or draw, and end a foreseen failure in one line."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from amsdn.errors import InputError


def run_or_draw(
    options: argparse.Namespace, benchmark: Callable[[argparse.Namespace], None], draw: Callable[[dict[str, Any], Path], None]
) -> int:
    """Draw the tables of ``options.out`` into ``options.docs`` where that is given, else run the benchmark; returns the exit code."""
    try:
        if options.docs:
            draw(json.loads(options.out.read_text()), options.docs)
        else:
            benchmark(options)
    except (InputError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    return 0
