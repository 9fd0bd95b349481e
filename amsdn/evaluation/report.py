"""One page about one model: everything its run folder shows, beside the runs it is compared with.

``build_report`` reads run folders and writes a self-contained ``report.html`` (nothing is fetched: style, charts and pictures
are inside) and ``report.json`` with every number of the page. The same folders always give the same bytes.

A run folder holds ``run.json`` (provenance), ``eval.jsonl`` (EvalRecord rows) and, where they were made, ``cert.jsonl``
(CertRecord rows; shards beside it), ``crosscheck.json``, the attacks on the certified classifiers, ``examples/<attack>.npz`` and
``hardest.npz``. All keys of run.json are optional; read here are
``command`` (text or a list), ``commit``, ``date``, ``seed``, ``versions``, ``hardware``, ``seconds``,
``model {config, parameters, fingerprint, detection_threshold, false_positive_rate}``, ``data {name, split, samples, classes, image_size}``
and ``headline {family: budget}``.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from amsdn.errors import InputError
from amsdn.evaluation import answer_panels, certificate_panels, panels
from amsdn.evaluation.bars import RECALLED
from amsdn.evaluation.calibration import BINS
from amsdn.evaluation.certification import read_certificates
from amsdn.evaluation.crosscheck import DEFENCE_RUNS, RESULT
from amsdn.evaluation.hardest_pictures import hardest_cards
from amsdn.evaluation.headline import GROUPS, Cell, Row, Run, count, percent
from amsdn.evaluation.headline_rows import headline_rows
from amsdn.evaluation.pictures import picture_groups
from amsdn.evaluation.reliability import read_checks
from amsdn.evaluation.summary import summarise
from amsdn.evaluation.terminal import as_text
from amsdn.evaluation.time_left import duration
from amsdn.records import CertRecord, EvalRecord, read_records, write_atomic


def build_report(runs: Mapping[str, Path], out: Path, *, title: str) -> Path:
    """Write ``report.html`` and ``report.json`` into the folder ``out``; returns the path of the page.

    Args:
        runs: a name for people -> run folder. The first is the model the report is about, the others are comparisons.
        title: the page's heading.

    Raises InputError where a folder lacks its rows, a file in it is broken, or the runs are about different data.
    """
    loaded = load_runs(runs)
    rows = headline_rows(loaded)
    numbers = _numbers(title, loaded, rows)
    page = _environment().get_template("report.html.j2").render(_context(title, loaded, rows, runs[loaded[0].name]))
    try:
        write_atomic(out / "report.json", (json.dumps(numbers, indent=2, allow_nan=False) + "\n").encode())
        write_atomic(out / "report.html", page.encode())
    except OSError as e:
        raise InputError(f"{out}: cannot write the report ({e.strerror}); choose a writable folder with space") from e
    return out / "report.html"


def terminal_table(runs: Mapping[str, Path]) -> str:
    """The headline table as plain text of at most 100 columns: the same rows and numbers as the page."""
    loaded = load_runs(runs)
    return as_text([run.name for run in loaded], headline_rows(loaded))


def load_runs(runs: Mapping[str, Path]) -> list[Run]:
    """Read and summarise every run folder, all at the headline budgets that the first one's run.json names (else its largest).

    Raises InputError as build_report does.
    """
    if not runs:
        raise InputError("no run folder given; name at least one folder made by `amsdn evaluate`")
    loaded: list[Run] = []
    for name, folder in runs.items():
        loaded.append(_load_run(name, folder, loaded[0].summary["headline"] if loaded else None))
    first = loaded[0]
    for run in loaded[1:]:
        mine, other = _data_name(first), _data_name(run)
        if mine != other:
            raise InputError(f"{runs[run.name]}: evaluated on {other}, but {runs[first.name]} on {mine}; compare runs on the same data")
    return loaded


def _load_run(name: str, folder: Path, headline: Mapping[str, float] | None) -> Run:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such run folder; make it with `amsdn evaluate`")
    info = _read_json(folder / "run.json")
    parts = [info.get(key) for key in ("data", "model", "versions", "seconds", "headline")] if isinstance(info, dict) else [info]
    if not isinstance(info, dict) or not all(part is None or isinstance(part, dict) for part in parts):
        raise InputError(f"{folder / 'run.json'}: not a JSON object of the expected shape; delete the folder and evaluate again")
    records = read_records(folder / "eval.jsonl", EvalRecord)
    if not any(r.family == "clean" for r in records):
        raise InputError(f"{folder / 'eval.jsonl'}: holds no clean rows; run `amsdn evaluate` to its end first")
    certificates = read_certificates(folder)
    summary = summarise(records, certificates, headline=headline or info.get("headline"))
    checked = _crosscheck(folder / RESULT)
    defences = _defences(folder, checked, certificates)
    return Run(name, info, records, certificates, summary, checked, defences, read_checks(folder))


def _crosscheck(path: Path) -> Any | None:
    """The cross-check's result; None where it was not run."""
    if not path.exists():
        return None
    found = _read_json(path)
    kinds = found.get("certificates") if isinstance(found, dict) else None
    needed = {"violations", "samples", "checks", "abstained"}
    if not isinstance(kinds, dict) or not all(isinstance(kind, dict) and needed <= kind.keys() for kind in kinds.values()):
        raise InputError(f"{path}: not a cross-check result; delete it and run `amsdn certify` again")
    return found


def _defences(folder: Path, checked: Any | None, certificates: Sequence[CertRecord]) -> dict[str, dict[str, Any]]:
    """By certificate, the summary of the attacks on the classifier that it certifies, with its certificates on the same samples."""
    found = {}
    for kind in DEFENCE_RUNS:
        attacked = (checked or {"certificates": {}})["certificates"].get(kind, {}).get("folder")
        if attacked and (path := folder / attacked / "eval.jsonl").exists():
            rows = read_records(path, EvalRecord)
            samples = {row.sample_id for row in rows}
            found[kind] = summarise(rows, [c for c in certificates if c.certificate == kind and c.sample_id in samples])
    return found


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes(), parse_constant=_refuse)
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror}); finish the run with `amsdn evaluate` first") from e
    except ValueError as e:
        raise InputError(f"{path}: not valid JSON ({e}); delete it and run the stage again") from e


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON number")


def _data_name(run: Run) -> str:
    data = run.info.get("data") or {}
    return f"{data.get('name', 'unnamed data')} ({data.get('split', 'unnamed split')})"


def _context(title: str, runs: Sequence[Run], rows: Sequence[Row], subject: Path) -> dict[str, Any]:
    """Everything the template shows."""
    groups = [
        (GROUPS[group], [(row, panels.strip(row)) for row in rows if row.group == group])
        for group in dict.fromkeys(row.group for row in rows)
    ]
    attacks, pictures = panels.attack_table(runs), picture_groups(runs[0], subject)
    return {
        "title": title,
        "runs": runs,
        "verdict": panels.verdict(runs, rows),
        "meta": _meta(runs[0]),
        "groups": groups,
        "attacks": attacks,
        "any_detector": any(attack["detection"] for attack in runs[0].summary["attacks"].values()),
        "any_bar": any(row.published for row in rows),
        "any_recalled": any(RECALLED in row.published for row in rows),
        "any_rejecting": any(row.key.startswith("rejecting:") for row in rows),
        "pictures": pictures,
        "any_heat": any(example["heat"] for group in pictures for example in group["examples"]),
        "curves": panels.budget_charts(runs),
        "certified": certificate_panels.certificate_charts(runs),
        "certificate_legend": certificate_panels.certificate_legend(runs),
        "certificate_facts": certificate_panels.certificate_facts(runs),
        "detectors": panels.roc_charts(runs),
        "calibrated": answer_panels.calibration_charts(runs),
        "bins": BINS,
        "classes": answer_panels.class_table(runs[0]),
        "hardest": hardest_cards(runs[0], subject),
        "believed": panels.check_table(runs),
        "crosschecks": [line for run in runs for line in certificate_panels.crosscheck_lines(run)],
        "limits": [*panels.limits(runs, rows), *certificate_panels.certificate_limits(runs[0])],
        "run_legend": panels.run_legend(runs),
        "legend_marks": [mark for mark, _ in panels.run_legend(runs)],
        "provenance": [_provenance(run) for run in runs],
    }


def _meta(run: Run) -> list[str]:
    """The line of facts under the verdict."""
    facts = [_data_name(run), f"{run.summary['samples']} images"]
    facts += [str(run.info[key]) for key in ("date", "hardware") if run.info.get(key)]
    return [*facts, f"commit {run.info['commit']}"] if run.info.get("commit") else facts


def _numbers(title: str, runs: Sequence[Run], rows: Sequence[Row]) -> dict[str, Any]:
    """The content of report.json."""
    headline = [
        {**dataclasses.asdict(row), "cells": dict(zip((r.name for r in runs), map(_plain, row.cells), strict=True))} for row in rows
    ]
    per_run = {
        r.name: {"run": r.info, "summary": r.summary, "crosscheck": _without_rows(r.crosscheck), "reliability": r.checks} for r in runs
    }
    return {"title": title, "subject": runs[0].name, "headline": headline, "runs": per_run}


def _without_rows(crosscheck: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if crosscheck is None:
        return None
    kinds = {name: {key: value for key, value in kind.items() if key != "rows"} for name, kind in crosscheck["certificates"].items()}
    return {**crosscheck, "certificates": kinds}


def _plain(cell: Cell | None) -> dict[str, Any] | None:
    return None if cell is None else dataclasses.asdict(cell)


def _provenance(run: Run) -> dict[str, Any]:
    """What somebody needs to make this run again."""
    command = run.info.get("command") or []
    data, model = run.info.get("data") or {}, run.info.get("model") or {}
    facts = [
        ("Commit", run.info.get("commit")),
        ("Date", run.info.get("date")),
        ("Seed", run.info.get("seed")),
        ("Hardware", run.info.get("hardware")),
        ("Data", f"{_data_name(run)}, {data.get('samples', run.summary['samples'])} images"),
        ("Model", _model_line(model)),
        ("Versions", ", ".join(f"{k} {v}" for k, v in (run.info.get("versions") or {}).items())),
        ("Time", ", ".join(f"{stage} {duration(s)}" for stage, s in (run.info.get("seconds") or {}).items())),
    ]
    return {
        "name": run.name,
        "commands": [command] if isinstance(command, str) else [str(c) for c in command],
        "facts": [(label, value if value not in (None, "") else "not recorded") for label, value in facts],
        "json": json.dumps(run.info, indent=2, ensure_ascii=False),
    }


def _model_line(model: Mapping[str, Any]) -> str:
    parts = []
    if isinstance(model.get("parameters"), int):
        parts.append(f"{count(model['parameters'])} parameters")
    if model.get("fingerprint"):
        parts.append(f"fingerprint {model['fingerprint']}")
    if model.get("detection_threshold") is not None:
        parts.append(f"flags above {model['detection_threshold']:.3g}")
    if model.get("false_positive_rate") is not None:
        parts.append(f"calibrated to {percent(model['false_positive_rate'])} % false positives")
    return ", ".join(parts)


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("amsdn.evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(pct=percent, interval=_interval, passes=_passes)
    return environment


def _passes(mean: float | None) -> str:
    """A mean number of passes; None where no image was attacked."""
    return "–" if mean is None else f"{mean:.1f}" if 0 < mean < 10 else count(mean)


def _interval(cell: Any) -> Markup:
    """A cell's interval as the page writes it, kept on one line."""
    return Markup('<span class="ci">[{}, {}]</span>').format(percent(cell.low), percent(cell.high))
