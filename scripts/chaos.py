#!/usr/bin/env python
"""Kill a whole three-stage training run again and again, and see whether it ends as if nobody had.

    python scripts/chaos.py --kills 50 --out results/training/chaos.json

The three training commands run once undisturbed. Then they run in another folder, killed by SIGKILL at random moments and
started again by the same words, and all final weights, curves and records are compared: bit for bit, on one CPU thread.

Moments are random in time, spread over what a run does: each kill waits for one kind of moment (starting, resuming, a step, the
writing of a checkpoint, calibrating, saving the model, recording, the way from stage to stage) and strikes after a random delay
of about as long as that took undisturbed, so that it may also meet what comes next, but at most a step. Most restarts are forked from a process that
has imported everything, since importing is most of a restart's cost and touches no file; every tenth starts a fresh interpreter.
"""

import argparse
import itertools
import json
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

STAGES = ("pretrain", "train", "finetune")
EARLY = ("step", "checkpoint", "step", "start", "step", "resume", "checkpoint")  # moments before a stage's last step, in turn
LATE = ("save", "calibrate", "done", "save", "record", "done")  # and after it
FRESH_EVERY = 10  # one restart of so many starts a new interpreter
Command = list[str]


@dataclass(frozen=True)
class Moment:
    """What a kill waits for."""

    stage: int
    phase: str


@dataclass(frozen=True)
class Kill:
    """What a kill met."""

    waited_for: str
    met: str  # the phase that had begun last
    fresh: bool  # whether that process had started a new interpreter
    seconds: float  # after its start


def digits_commands(out: Path, epochs: float) -> list[Command]:
    """The three stages on digits at 16 pixels, with a network of width 4."""
    fields = ["--data", "digits", "--limit", "160", "--image-size", "16", "--model.width", "4", "--device", "cpu", "--out", str(out)]
    loop = ["--loop.epochs", f"{epochs:g}", "--loop.batch-size", "16", "--loop.checkpoint-every-s", "0.2", "--loop.log-every", "5"]
    return [[stage, *fields, *loop] for stage in STAGES]


def plan(kills: int, rng: random.Random) -> list[Moment]:
    """Moments in the order of the stages, two thirds of each stage's before its last step."""
    moments = []
    for stage in range(len(STAGES)):
        mine = kills // len(STAGES) + (stage < kills % len(STAGES))
        late = mine // 3
        early = [Moment(stage, EARLY[i % len(EARLY)]) for i in range(mine - late)]
        rng.shuffle(early)
        # Nothing follows the last stage: its process has ended before "done" can be answered.
        ends = [phase for phase in LATE if phase != "done" or stage < len(STAGES) - 1]
        moments += early + [Moment(stage, ends[i % len(ends)]) for i in range(late)]
    return moments


# What a started process does ------------------------------------------------------------------------------------------


def drive(commands: Sequence[Command], mark: Callable[[str], None]) -> int:
    """Run the commands one after the other in this process, telling ``mark`` what begins; the first exit code that is not 0."""
    import amsdn.commands.stages as stages
    import amsdn.training.run as run
    from amsdn.cli import main

    mark("start")
    stage = ""

    def telling(module: Any, name: str, phase: str, then: str | None = None) -> None:
        real = getattr(module, name)

        def told(*args: Any, **kwargs: Any) -> Any:
            mark(f"{stage} {phase}")
            result = real(*args, **kwargs)
            if then is not None:
                mark(f"{stage} {then}")
            return result

        setattr(module, name, told)

    telling(stages, "train", "resume")
    telling(run.Run, "gradient", "step")
    telling(run, "save_state", "checkpoint", "stepped")
    for name, phase in (("calibrate", "calibrate"), ("save_model", "save"), ("write_json", "record")):
        telling(stages, name, phase)
    for command in commands:
        stage = command[0]
        if code := main(command):
            return code
        mark(f"{stage} done")
    return 0


class Leg:
    """One started process, and the phases it tells of until it ends."""

    def __init__(self, commands: Sequence[Command], log: Path, fresh: bool) -> None:
        self.began, self.fresh = time.monotonic(), fresh
        self.reading, writing = os.pipe()
        self.pid = self._interpreter(commands, log, writing) if fresh else self._fork(commands, log, writing)
        os.close(writing)
        self.unread, self.last = b"", "none"

    def _interpreter(self, commands: Sequence[Command], log: Path, writing: int) -> int:
        words = [sys.executable, __file__, "--drive", str(writing), json.dumps(list(commands))]
        os.set_inheritable(writing, True)
        append = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        outputs = [(os.POSIX_SPAWN_OPEN, output, str(log), append, 0o644) for output in (1, 2)]
        return os.posix_spawn(sys.executable, words, os.environ, file_actions=outputs)

    def _fork(self, commands: Sequence[Command], log: Path, writing: int) -> int:
        if pid := os.fork():
            return pid
        output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        code = 70
        try:
            code = drive(commands, lambda phase: _tell(writing, phase))
        finally:
            sys.stdout.flush()
            os._exit(code)

    def phases(self) -> Iterator[str]:
        """Every phase as it begins; ends with the process."""
        while byte := os.read(self.reading, 1):  # one by one: what is not asked for stays in the pipe
            self.unread += byte
            if byte == b"\n":
                self.last, self.unread = self.unread.decode().strip(), b""
                yield self.last

    def kill(self, delay_s: float) -> bool:
        """SIGKILL after a delay, or sooner if a step begins, so that no kill costs the run more than a step; whether it still ran."""
        deadline = time.monotonic() + delay_s
        while (left := deadline - time.monotonic()) > 0:
            if not select.select([self.reading], [], [], left)[0]:
                break
            told = next(self.phases(), None)
            if told is None or told.endswith(" step"):
                break
        os.kill(self.pid, signal.SIGKILL)
        for _ in self.phases():  # what it had told by then
            pass
        return self.end() == -signal.SIGKILL

    def end(self) -> int:
        """Wait for the process; its exit code, or minus the signal that ended it."""
        _, status = os.waitpid(self.pid, 0)
        os.close(self.reading)
        return os.waitstatus_to_exitcode(status)


def _tell(descriptor: int, phase: str) -> None:
    os.write(descriptor, f"{phase}\n".encode())


# The experiment -------------------------------------------------------------------------------------------------------


def undisturbed(commands: Sequence[Command], log: Path, fresh: bool) -> dict[str, float]:
    """Run to the end; how long each phase took on average, and with " all" how many steps a stage had."""
    leg, marks = Leg(commands, log, fresh), []
    for phase in leg.phases():
        marks.append((phase, time.monotonic()))
    marks.append(("end", time.monotonic()))
    if code := leg.end():
        raise SystemExit(f"the undisturbed run failed with exit code {code}; see {log}")
    took: dict[str, list[float]] = {}
    for (phase, begun), (_, ended) in itertools.pairwise(marks):
        took.setdefault(phase, []).append(ended - begun)
    found = {phase: sum(times) / len(times) for phase, times in took.items()}
    return found | {f"{s} all": float(len(took.get(f"{s} step", []))) for s in STAGES}


def disturb(
    commands: Sequence[Command], moments: Sequence[Moment], usual: dict[str, float], log: Path, rng: random.Random, every: int
) -> list[Kill]:
    """Kill at each of the moments; raises SystemExit if a process fails by itself, or the run ends too early."""
    kills: list[Kill] = []
    steps = Counter(m.stage for m in moments if m.phase in ("step", "checkpoint"))
    for number, moment in enumerate(moments):
        for _ in range(20):
            leg = Leg(commands, log, number % every == 0)
            spare = usual[f"{STAGES[moment.stage]} all"] / (steps[moment.stage] + 1)  # steps that a kill may let happen
            phase = _wait(leg, moment, rng.randint(1, max(1, round(spare))))
            if phase is None:
                if code := leg.end():
                    raise SystemExit(f"a process failed by itself with exit code {code} before kill {number + 1}; see {log}")
                if moment.phase not in LATE:
                    raise SystemExit(f"the run ended before kill {number + 1} of {len(moments)}; use more --epochs")
                moment = replace(moment, phase="calibrate")  # the record was written before an earlier kill; this comes every time
                continue
            if leg.kill(rng.uniform(0, 1.5 * usual.get(phase, 0.0))):
                kills.append(Kill(moment.phase, leg.last.split()[-1], leg.fresh, round(time.monotonic() - leg.began, 2)))
                print(f"kill {len(kills)} of {len(moments)}: waited for {phase}, met {leg.last}", file=sys.stderr, flush=True)
                break
        else:
            raise SystemExit(f"20 processes ended before kill {number + 1} ({moment}) could strike")
    return kills


def _wait(leg: Leg, moment: Moment, count: int) -> str | None:
    """The phase that ``moment`` asks for (of steps the ``count``-th), or the first step of a later stage; None if the process ends before."""
    for phase in leg.phases():
        stage, _, kind = phase.rpartition(" ")
        if kind == moment.phase == "start":
            return phase
        reached = STAGES.index(stage) if stage else -1
        if reached > moment.stage and kind == "step":
            return phase
        if reached >= moment.stage and kind == moment.phase:
            count -= 1
            if count <= 0 or kind not in ("step", "checkpoint"):
                return phase
    return None


def compare(whole: Path, cut: Path) -> dict[str, dict[str, bool]]:
    """Per stage, whether weights, curve and record agree, and nothing half-written is left."""
    return {stage: _compare_stage(whole / stage, cut / stage) for stage in STAGES}


def _compare_stage(whole: Path, cut: Path) -> dict[str, bool]:
    def curve(folder: Path) -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
        return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]

    def record(folder: Path) -> list[Any]:
        info = json.loads((folder / "run.json").read_text())
        return [info[key] for key in ("model", "data", "steps", "images", "config", "clean_accuracy_val")]

    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (whole, cut)]
    torn = [p for p in cut.rglob(".*") if p.is_file()]
    return {
        "weights": weights[0] == weights[1],
        "curve": curve(whole) == curve(cut),
        "record": record(whole) == record(cut),
        "clean": not torn,
    }


def chaos(
    make: Callable[[Path], list[Command]], work: Path, moments: Sequence[Moment], rng: random.Random, every: int = FRESH_EVERY
) -> dict[str, Any]:
    """The whole experiment in the folder ``work``; ``every`` 1 starts a fresh interpreter each time."""
    began, log = time.monotonic(), work / "log.txt"
    usual = undisturbed(make(work / "whole"), log, fresh=every == 1)
    kills = disturb(make(work / "cut"), moments, usual, log, rng, every)
    undisturbed(make(work / "cut"), log, fresh=every == 1)  # the last restart
    return {
        "kills": len(kills),
        "by_phase_met": dict(sorted(Counter(kill.met for kill in kills).items())),
        "by_phase_waited_for": dict(sorted(Counter(kill.waited_for for kill in kills).items())),
        "fresh_interpreters": sum(kill.fresh for kill in kills),
        "equal": compare(work / "whole", work / "cut"),
        "seconds": round(time.monotonic() - began, 1),
        "each": [asdict(kill) for kill in kills],
    }


def main(words: Sequence[str]) -> int:
    if words[:1] == ["--drive"]:
        return drive(json.loads(words[2]), lambda phase: _tell(int(words[1]), phase))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path("results/training/chaos.json"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=float, default=4, help="of every stage")
    parser.add_argument("--work", type=Path, help="folder for both runs; kept. Default: a temporary one, removed when all agrees")
    asked = parser.parse_args(words)
    os.environ["OMP_NUM_THREADS"] = "1"  # sums must be split alike in all processes
    import sklearn.datasets  # noqa: F401
    import torch

    import amsdn.commands.finetune
    import amsdn.commands.pretrain
    import amsdn.commands.train  # noqa: F401  all are here once, for the processes forked from this one
    from amsdn.commands.common import provenance

    torch.set_num_threads(1)
    work = asked.work or Path(tempfile.mkdtemp(prefix="chaos_"))
    work.mkdir(parents=True, exist_ok=True)
    if any(work.iterdir()):
        raise SystemExit(f"{work}: not empty; another run would be mixed with this one")
    rng = random.Random(asked.seed)
    result = chaos(lambda out: digits_commands(out, asked.epochs), work, plan(asked.kills, rng), rng)
    origin = provenance(torch.device("cpu"), seed=asked.seed) | {"command": " ".join(["python", "scripts/chaos.py", *words])}
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(origin | result, indent=1) + "\n")
    fine = all(all(found.values()) for found in result["equal"].values())
    print(json.dumps({key: result[key] for key in ("kills", "by_phase_met", "equal", "seconds")}, indent=1))
    if fine and asked.work is None:
        shutil.rmtree(work)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
