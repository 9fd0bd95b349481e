"""Attack a classifier sample by sample and write down what happened (one EvalRecord per sample and attack).

The run folder after ``evaluate``:

- ``eval_config.json``: what must be the same for a killed run to be resumed,
- ``eval.jsonl``: the rows; tables are derived from them by ``amsdn.evaluation.summary``,
- ``eval.<i>-of-<n>.jsonl``: the rows of one shard of n; they go to ``eval.jsonl`` when the whole is evaluated,
- ``examples/<attack>.npz``: the first few samples as pictures (see ``example_arrays``).
"""

import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from amsdn.attacks.base import Attack
from amsdn.errors import InputError
from amsdn.evaluation.examples import Arrays, Examples, example_arrays
from amsdn.evaluation.outcome import Outcome, clean_outcome, confidence_of, seen_of
from amsdn.evaluation.run_folder import Samples, choose_ids, claim, data_fingerprint, id_range, model_fingerprint, writing_to
from amsdn.evaluation.shards import WHOLE, Shard, every_shard, read_shards
from amsdn.evaluation.time_left import TimeLeft, duration
from amsdn.protocols import check_eval_mode, check_images, device_of
from amsdn.records import EvalRecord, Key, RecordLog, config_hash
from amsdn.utils.helpers import derive_seed, generator

CLEAN = "clean"
SETTINGS = "eval_config.json"
RECORDS = "eval.jsonl"
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"


@dataclass(frozen=True)
class EvaluateConfig:
    """How an evaluation is run; the attacks are arguments of ``evaluate``."""

    seed: int = 0
    batch_size: int = 50  # samples attacked together, the most that a kill can lose; part of what makes two runs the same
    keep_examples: int = 8  # how many samples to keep as pictures

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.keep_examples < 0:
            raise InputError(f"batch_size must be at least 1 and keep_examples at least 0, got {self.batch_size} and {self.keep_examples}")


def evaluate(
    model: nn.Module,
    split: Samples,
    attacks: Mapping[str, Attack],
    out: Path,
    config: EvaluateConfig | None = None,
    *,
    sample_ids: Sequence[int] | None = None,
    shard: Shard = WHOLE,
    progress: bool = True,
    planned: Mapping[str, float] | None = None,
    title: str = "evaluate",
) -> list[EvalRecord]:
    """Evaluate ``model`` on clean images and under each of ``attacks``, and return all rows in order.

    ``model`` is any classifier in eval mode (images [B,3,H,W] in [0,1] -> logits [B,K]); one with ``analyze`` also
    gets anomaly scores, decisions and localisation. All clean images come first; then, chunk by chunk of the samples, the attacks in
    order, so that a run that is cut short is a whole evaluation of fewer images. Each attack has its own seed per chunk, so a run that was
    killed and is started again with the same arguments ends with the rows of an undisturbed one. Attacks may be added to a finished run.
    ``planned``, seconds an image and attack (see ``cost``), is what the time left is told from until each attack has met a chunk;
    ``title`` is what the progress bar says.

    With ``shard = Shard(i, n)`` only every n-th chunk, from the i-th, is attacked and returned, into a file of its own; n processes
    that share ``out`` do the whole, and a call without a shard then gathers their rows and pictures and attacks what is missing:
    its files are those of an undivided run, byte for byte.

    Raises InputError where ``out`` holds another run, an attack's name cannot be a file name, or the model or data
    cannot be used. Errors of an attack pass through.
    """
    config = config or EvaluateConfig()
    check_eval_mode(model, "evaluate")
    check_names(attacks)
    ids = choose_ids(split, sample_ids)
    settings = {
        "samples": id_range(ids),
        "data": data_fingerprint(split),
        "model": model_fingerprint(model),
        "batch_size": config.batch_size,
        "seed": config.seed,
    }
    with writing_to(out):
        claim(out, SETTINGS, settings, every_shard(RECORDS))
        log = RecordLog(out / shard.file(RECORDS), EvalRecord)
    known = read_shards(out, RECORDS, EvalRecord)
    check_same_attacks(known.values(), attacks)
    chunks = shard.of(_chunks(ids, config.batch_size))
    keep = frozenset(ids[: config.keep_examples])
    run = _Run(model, split, out, config, chunks, keep, log, known, shard, TimeLeft(planned))
    run.all_rows({CLEAN: None, **attacks}, title if progress else None)
    wanted = [(i, hash_of(attack), config.seed) for attack in [None, *attacks.values()] for chunk in chunks for i in chunk]
    return [known[key] for key in wanted]


@dataclass
class _Run:
    """One evaluation under way: computes what is missing, appends it, keeps the pictures."""

    model: nn.Module
    split: Samples
    out: Path
    config: EvaluateConfig
    chunks: Sequence[list[int]]  # those of this shard
    keep: frozenset[int]  # the samples to keep as pictures, those of other shards among them
    log: RecordLog[EvalRecord]  # the file that this shard writes
    known: dict[Key, EvalRecord]  # the rows of all files
    shard: Shard
    time_left: TimeLeft

    def all_rows(self, attacks: Mapping[str, Attack | None], title: str | None) -> None:
        """Make every row that is not there yet, under a bar with that title if any; the whole takes in those of the shards."""
        todo = Counter({name: sum(map(len, self._undone(hash_of(attack)))) for name, attack in attacks.items()})
        clean, *others = attacks.items()
        steps = [(*step, chunk) for part in ([clean], others) for chunk in self.chunks for step in part]
        with tqdm(total=sum(len(chunk) for _, _, chunk in steps), desc=title, bar_format=BAR, disable=title is None) as bar:
            for name, attack, chunk in steps:
                left = self.time_left.seconds(todo)
                bar.set_postfix_str(name if left is None else f"{name}, about {duration(left)} left")
                todo[name] -= self._rows_for(name, attack, chunk)
                bar.update(len(chunk))
            bar.set_postfix_str(f"clean {self._accuracy(hash_of(None)):.1%}")
        if self.shard.whole:
            with writing_to(self.out):
                for name, attack in attacks.items():
                    self._examples(name, attack).finish(self.chunks)

    def _undone(self, key: str) -> list[list[int]]:
        """The chunks of which some row is missing."""
        return [chunk for chunk in self.chunks if any((i, key, self.config.seed) not in self.known for i in chunk)]

    def _examples(self, name: str, attack: Attack | None) -> Examples:
        return Examples(self.out, name, hash_of(attack), () if attack is None else self.keep)

    def _rows_for(self, name: str, attack: Attack | None, chunk: list[int]) -> int:
        """Make the rows of one attack on one chunk, unless they are there; returns of how many images that had some to be made."""
        key, start = hash_of(attack), time.monotonic()
        rows = {i: row for i in chunk if (row := self.known.get((i, key, self.config.seed)))}
        examples = self._examples(name, attack)
        missing, illustrated = [i for i in chunk if i not in rows], examples.missing(chunk)
        if missing or illustrated:
            with self._model_noise(key, chunk):
                outcome = self._attack(attack, key, chunk)
                rows = {row.sample_id: row for row in self._rows(name, attack, key, chunk, outcome)} | rows
                pictures = self._pictures(outcome, chunk, illustrated) if illustrated else None
            if pictures is not None:  # before the rows, which say that the chunk is done
                with writing_to(self.out):
                    examples.add(chunk, pictures)
            self.time_left.note(name, len(chunk), time.monotonic() - start)
        self._keep_rows(rows[i] for i in (chunk if self.shard.whole else missing))
        return len(chunk) if missing else 0

    def _keep_rows(self, rows: Iterable[EvalRecord]) -> None:
        """Write the rows that this file does not hold."""
        fresh = [row for row in rows if row.key not in self.log.rows]
        with writing_to(self.out):
            self.log.append(fresh)
        self.known.update((row.key, row) for row in fresh)

    def _pictures(self, outcome: Outcome, chunk: list[int], keep: list[int]) -> Arrays:
        at = torch.tensor([chunk.index(i) for i in keep], device=outcome.x.device)
        return example_arrays(self.model, outcome.x[at], outcome.x_adv[at], outcome.label[at], outcome.prediction[at], keep)

    def _attack(self, attack: Attack | None, key: str, chunk: list[int]) -> Outcome:
        device = device_of(self.model)
        indices = torch.tensor(chunk, dtype=torch.long)
        x, y = (t.to(device) for t in self.split.fetch(indices))
        check_images(x, f"samples {chunk[0]}..{chunk[-1]}")
        if attack is None:
            return clean_outcome(self.model, x, y, chunk)
        result = attack(self.model, x, y, generator=generator(device, self.config.seed, key, chunk[0]))
        return Outcome(
            x, result.x_adv, y, result.prediction, result.success, result.margin, result.spent, result.forwards, result.backwards
        )

    @contextmanager
    def _model_noise(self, key: str, chunk: list[int]) -> Iterator[None]:
        """A stochastic model may draw from the global generator: lend it a state of its own, so that a resumed run repeats it."""
        device = device_of(self.model)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(derive_seed("model noise", self.config.seed, key, chunk[0]))
            yield

    def _rows(self, name: str, attack: Attack | None, key: str, chunk: list[int], outcome: Outcome) -> list[EvalRecord]:
        local = attack is not None and attack.threat.counts  # "where" has an answer only if a few pixels changed
        seen = seen_of(self.model, outcome, local)
        columns = [getattr(outcome, c).tolist() for c in ("spent", "label", "prediction", "correct", "margin", "forwards", "backwards")]
        successes = [None] * len(chunk) if outcome.success is None else outcome.success.tolist()
        family, budget = (CLEAN, 0.0) if attack is None else (attack.threat.family, float(attack.threat.budget))
        return [
            EvalRecord(
                sample_id=sample_id,
                config_hash=key,
                seed=self.config.seed,
                attack=name,
                family=family,
                budget=budget,
                spent=float(spent),
                label=int(label),
                prediction=int(prediction),
                correct=bool(correct),
                margin=float(margin),
                forwards=int(forwards),
                backwards=int(backwards),
                anomaly_score=seen.scores[i],
                detected=seen.alarms[i],
                localisation=seen.auroc[i],
                evades=attack is not None and attack.evades,
                success=success,
                confidence=confidence,
                pointing=seen.pointing[i],
                overlap=seen.overlap[i],
            )
            for i, (sample_id, spent, label, prediction, correct, margin, forwards, backwards, success, confidence) in enumerate(
                zip(chunk, *columns, successes, confidence_of(self.model, outcome), strict=True)
            )
        ]

    def _accuracy(self, key: str) -> float:
        rows = [self.known[k] for chunk in self.chunks for i in chunk if (k := (i, key, self.config.seed)) in self.known]
        return sum(row.correct for row in rows) / max(len(rows), 1)


def hash_of(attack: Attack | None) -> str:
    """The key of an attack's rows; None stands for the clean images."""
    return config_hash(CLEAN if attack is None else attack)


def check_names(attacks: Mapping[str, Attack]) -> None:
    """Raise InputError unless every name can be a file name, none is taken, and no two attacks are the same."""
    for name in attacks:
        if name == CLEAN or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", name):
            raise InputError(f"attack name {name!r} cannot be used; take letters, digits and . _ + - and not 'clean'")
    hashes = [hash_of(a) for a in attacks.values()]
    for name, key in zip(attacks, hashes, strict=True):
        if hashes.count(key) > 1:
            raise InputError(f"attack {name!r} is given twice with the same configuration; drop one")


def check_same_attacks(rows: Iterable[EvalRecord], attacks: Mapping[str, Attack]) -> None:
    """Raise InputError where a name already stands for another configuration in the records, or the other way round."""
    wanted = {name: hash_of(attack) for name, attack in {CLEAN: None, **attacks}.items()}
    names = {key: name for name, key in wanted.items()}
    for row in rows:
        if wanted.get(row.attack, row.config_hash) != row.config_hash:
            raise InputError(f"the run there has another attack named {row.attack!r}; give this one another name or use another folder")
        if names.get(row.config_hash, row.attack) != row.attack:
            raise InputError(f"attack {names[row.config_hash]!r} is in the run there as {row.attack!r}; use that name or another folder")


def _chunks(ids: list[int], size: int) -> list[list[int]]:
    return [ids[start : start + size] for start in range(0, len(ids), size)]


if __name__ == "__main__":
    import sys

    from amsdn.cli import main

    sys.exit(main(["evaluate", *sys.argv[1:]]))
