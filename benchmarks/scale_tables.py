"""docs/training/scale.md's tables: the measured inputs, and what ``scale_model`` makes of them."""

from dataclasses import replace
from typing import Any

from scale_model import (
    SHARES,
    Cluster,
    Job,
    asked,
    at_shares,
    cores_needed,
    gpu_hours,
    hindrance,
    parts,
    saturation,
    scaling,
    shared,
    step_seconds,
    wall_hours,
)
from training_tables import table

GPUS = (1, 8, 16, 32, 64, 128, 256, 512)
HOUSE = 64  # the size that the page is about
EVALUATED, CHUNK = 5000, 50  # images: RobustBench's ImageNet count; and those of one chunk of ``amsdn evaluate``
LARGE = 4096  # images a step: ConvNeXt's own batch (Liu et al. 2022, Table 5)
NAMES = {"train": "train stage", "finetune": "fine-tuning stage", "clean": "clean", "pgd-10": "PGD-10 on every image"}


def jobs(found: dict[str, Any]) -> dict[str, Job]:
    """The measured steps on the measured model, by their keys in the file."""
    return {
        kind: Job(
            name=NAMES[kind],
            forward=1e9 * found["gflop"]["forward"],
            f=step["f"],
            kernels=found["operators"]["training"] * step["f"] / 3,
            parameters=found["model"]["parameters"],
            decode=found["decode"]["random_resized_crop"],
            batch=found["recipe"]["batch"],
            epochs=step["epochs"],
        )
        for kind, step in found["steps"].items()
    }


def scale_table(found: dict[str, Any]) -> str:
    """All tables as Markdown."""
    made, cluster = jobs(found), Cluster()
    sections = [_inputs(found), _by_gpus(made["train"], cluster), _by_recipe(made, cluster), _asked(found, cluster), _origin(found)]
    return "\n\n".join("\n".join(lines) for lines in sections)


def _inputs(found: dict[str, Any]) -> list[str]:
    model, pass_seconds = found["model"], found["training_pass"]["seconds_per_image"]
    speed = found["gflop"]["training"] / pass_seconds["median"]
    share = speed / found["peak_gflops"][found["training_pass"]["precision"]]
    decode = found["decode"]
    recipe = f"counted, `{found['recipe']['name']}`"
    sizes = " and ".join(f"{size / 1000:.0f}" for size in decode["bytes"])
    rows = [
        ["parameters", f"{model['parameters'] / 1e6:.1f} million", "counted"],
        ["forward pass", f"{found['gflop']['forward']:.1f} GFLOP an image", "counted"],
        ["forward and backward", f"{found['gflop']['training']:.1f} GFLOP an image", "counted"],
        ["operators of a forward and backward pass", f"{found['operators']['training']:,}", "counted"],
        *[[f"{NAMES[kind]}, a step", f"{step['f']:.2f} forward passes an image", recipe] for kind, step in found["steps"].items()],
        ["forward and backward, bf16, this CPU", f"{pass_seconds['median']:.3f} s an image", f"{speed:.0f} GFLOP/s, {100 * share:.0f} % of the peak"],
        ["largest bf16 matrix product, this CPU", f"{found['peak_gflops']['bf16']:.0f} GFLOP/s", "measured"],
        ["JPEG to a random 224 px crop, one core", f"{decode['random_resized_crop']:.0f} images a second", f"two photographs, 500x375, {sizes} kB"],
        ["the same by our folder reader", f"{decode['folder_reader']:.0f} images a second", "centre crop"],
        ["training state", f"{found['checkpoint']['bytes'] / 1e6:.0f} MB", f"{found['checkpoint']['seconds']:.2f} s of one core to write"],
    ]  # fmt: skip
    return ["## Measured", "", *table(["what", "how much", "how"], rows, 3)]


def _by_gpus(job: Job, cluster: Cluster) -> list[str]:
    rows = []
    for gpus in GPUS:
        p = parts(job, cluster, gpus)
        waiting = replace(job, overlap=False)
        rows.append(
            [
                gpus,
                job.batch // gpus,
                *(f"{1e3 * p[part]:.1f}" for part in ("arithmetic", "kernel launches", "data", "all-reduce")),
                f"{1e3 * step_seconds(job, cluster, gpus):.1f}",
                f"{1e3 * step_seconds(waiting, cluster, gpus):.1f}",
                f"{100 * scaling(job, cluster, gpus):.0f}",
                f"{gpu_hours(job, cluster, gpus):.1f}",
                f"{wall_hours(job, cluster, gpus):.2f}",
            ]
        )
    head = [
        "GPUs",
        "images each",
        "arithmetic, ms",
        "launches",
        "data",
        "all-reduce",
        "step",
        "not reading ahead",
        "scaling, %",
        "GPU-hours",
        "hours",
    ]
    return [
        f"## A step of the {job.name}, by number of GPUs",
        "",
        *table(head, rows, 0),
        "",
        f"Modelled: {job.batch:,} images a step, {job.epochs:g} epochs of {job.images:,} images, {100 * cluster.share:.0f} % of the peak. Scaling: what is "
        "left of n times the speed of one GPU. Not reading ahead: if a step waited for its images to be decoded.",
    ]


def _by_recipe(made: dict[str, Job], cluster: Cluster) -> list[str]:
    rows = []
    for job in made.values():
        waiting = replace(job, overlap=False)
        large = replace(job, batch=LARGE)
        for name, one in ((job.name, job), ("- not reading ahead", waiting), (f"- {LARGE:,} images a step", large)):
            hours = at_shares(cluster, lambda c, one=one: gpu_hours(one, c, HOUSE))  # type: ignore[misc]
            points = at_shares(cluster, lambda c, one=one: saturation(one, c))  # type: ignore[misc]
            most = saturation(one, cluster)
            rows.append(
                [
                    name,
                    f"{one.epochs:g}",
                    ", ".join(f"{h:.1f}" for h in hours),
                    ", ".join(f"{h / HOUSE:.2f}" for h in hours),
                    ", ".join(f"{n:.0f}" for n in points),
                    hindrance(one, cluster, 2 * most),
                    f"{cores_needed(one, cluster):.0f}",
                ]
            )
    head = [
        "training",
        "epochs",
        f"GPU-hours on {HOUSE} GPUs",
        "hours",
        "GPUs at 80 % scaling",
        "what then hinders most",
        "cores a GPU to keep up",
    ]
    shares = ", ".join(f"{100 * share:.0f}" for share in SHARES)
    whole = ", ".join(
        f"{a + b:.1f}"
        for a, b in zip(*(at_shares(cluster, lambda c, k=k: gpu_hours(made[k], c, HOUSE)) for k in ("train", "finetune")), strict=True)
    )  # type: ignore[misc]
    return [
        f"## {HOUSE} GPUs",
        "",
        *table(head, rows, 1),
        "",
        f"Modelled, at {shares} % of the peak; the last two columns at {100 * cluster.share:.0f} %. The recipe's two labelled stages together: {whole} GPU-hours.",
    ]


def _asked(found: dict[str, Any], cluster: Cluster) -> list[str]:
    forward = 1e9 * found["gflop"]["forward"]
    rows = []
    for name, f in found["asked"].items():
        hours = asked(EVALUATED, f, forward, cluster)
        even = shared(EVALUATED, CHUNK, HOUSE)
        rows.append([name, f"{f:,.0f}", f"{hours:.2f}", f"{60 * hours / HOUSE / even:.2f}", f"{100 * even:.0f}"])
    head = ["asked", "forward passes an image", "GPU-hours", f"minutes on {HOUSE} GPUs", "evenness of shards, %"]
    note = f"Modelled for {EVALUATED:,} images in chunks of {CHUNK}; passes an image as measured on small models at 32 px, a gradient counted as one more."
    return ["## Evaluation and certification", "", *table(head, rows, 1), "", note]


def _origin(found: dict[str, Any]) -> list[str]:
    return [
        f"Inputs: `{found['command']}` at commit {found['commit']}, {found['date']}, {found['hardware']}, torch {found['versions']['torch']}."
    ]
