"""What training on many GPUs would cost, and where more of them stop helping: arithmetic on measured inputs, no torch.

The step of n GPUs is the sum of its parts, but that the images of the next step are decoded while the GPUs compute, as our loop does
(``amsdn.training.ahead``); with ``overlap=False`` each step waits for its own images:

    compute     max(images a GPU x forwards an image x operations a forward / (peak x share of it), kernels x launch time)
    data        images a GPU / (cores it has, or the reader's threads if fewer, x images a core decodes a second)
    all-reduce  ring: 2 (n-1)/n x bytes of gradients / link + 2 (n-1) x latency; one flat all-reduce after the step's passes

Every number that is an assumption is a field of ``Cluster`` with its source; what is measured comes in as a ``Job``.
``benchmarks/scale_measure.py`` measures, ``scripts/benchmark_tables.py`` draws.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

MOST_GPUS = 4096  # how far the search for the saturating point goes
SHARES = (0.20, 0.10, 0.05)  # of the H200's peak, the range that is reckoned with; docs/training/scale.md says why


@dataclass(frozen=True)
class Cluster:
    """Assumptions about the machines: not measured here."""

    peak: float = 989e12  # operations a second in bf16, dense: NVIDIA's data sheet of the H200 SXM
    share: float = 0.10  # of the peak that training reaches; unknown until it is measured: see SHARES
    gpus_per_host: int = 8
    cores_per_gpu: int = 12  # 96 cores for 8 GPUs
    within: float = 450e9  # bytes a second each way for a GPU inside a host (NVLink 4: 900 GB/s both ways)
    between: float = 50e9  # for a GPU between hosts: one 400 Gbit/s link each
    latency: float = 10e-6  # seconds for each hop of the ring
    launch: float = 5e-6  # seconds of the host for each kernel, without compilation or CUDA graphs


@dataclass(frozen=True)
class Job:
    """One way to train one model, as measured or counted."""

    name: str
    forward: float  # operations for one image forward
    f: float  # forward passes' worth of operations for an image of a step
    kernels: float  # operators dispatched in a step on one GPU, whatever the batch
    parameters: int
    decode: float  # images a second that one core decodes, crops and resizes
    batch: int = 1024  # images of a step, over all GPUs
    images: int = 1_281_167  # ImageNet-1k's training set
    epochs: float = 5
    overlap: bool = True  # the next step's images are decoded while the GPUs compute
    readers: int = 8  # threads that our folder reader decodes with in each process, at most (amsdn.data.folder.WORKERS)


def parts(job: Job, cluster: Cluster, gpus: int) -> dict[str, float]:
    """Seconds of each part of a step on ``gpus`` GPUs."""
    each = math.ceil(job.batch / gpus)
    arithmetic = each * job.f * job.forward / (cluster.peak * cluster.share)
    return {
        "arithmetic": arithmetic,
        "kernel launches": max(0.0, job.kernels * cluster.launch - arithmetic),  # what the GPU waits for the host beyond its own work
        "data": each / (min(job.readers, cluster.cores_per_gpu) * job.decode),
        "all-reduce": all_reduce(4 * job.parameters, cluster, gpus),
    }


def all_reduce(size: float, cluster: Cluster, gpus: int) -> float:
    """Seconds of a ring all-reduce of ``size`` bytes; within one host over its own links, else at the speed of the links between."""
    if gpus == 1:
        return 0.0
    link = cluster.within if gpus <= cluster.gpus_per_host else cluster.between
    return 2 * (gpus - 1) / gpus * size / link + 2 * (gpus - 1) * cluster.latency


def step_seconds(job: Job, cluster: Cluster, gpus: int) -> float:
    """Seconds of one step."""
    p = parts(job, cluster, gpus)
    compute = p["arithmetic"] + p["kernel launches"]
    return (max(compute, p["data"]) if job.overlap else compute + p["data"]) + p["all-reduce"]


def scaling(job: Job, cluster: Cluster, gpus: int) -> float:
    """How much of n times the speed of one GPU is left, whatever that one GPU waits for."""
    return step_seconds(job, cluster, 1) / gpus / step_seconds(job, cluster, gpus)


def saturation(job: Job, cluster: Cluster, least: float = 0.8) -> int:
    """The largest number of GPUs, of those that divide the batch into equal parts of 2 or more, that keeps ``scaling`` at ``least`` or above."""
    most = min(MOST_GPUS, job.batch // 2)
    fine = [n for n in range(1, most + 1) if job.batch % n == 0 and scaling(job, cluster, n) >= least]
    return max(fine)


def hindrance(job: Job, cluster: Cluster, gpus: int) -> str:
    """What keeps ``gpus`` GPUs from ``gpus`` times the speed of one: the part that would gain most if it divided evenly."""
    one = parts(job, cluster, 1)
    extra = {name: seconds - one[name] / gpus for name, seconds in parts(job, cluster, gpus).items()}
    if job.overlap:
        extra.pop("data")  # it divides evenly, and is hidden besides
    return max(extra, key=extra.__getitem__)


def gpu_hours(job: Job, cluster: Cluster, gpus: int) -> float:
    """Of the whole training."""
    return job.epochs * job.images / job.batch * step_seconds(job, cluster, gpus) * gpus / 3600


def wall_hours(job: Job, cluster: Cluster, gpus: int) -> float:
    """Of the whole training."""
    return gpu_hours(job, cluster, gpus) / gpus


def cores_needed(job: Job, cluster: Cluster) -> float:
    """Cores for each GPU that decode as fast as the GPU computes, where decoding overlaps."""
    return cluster.peak * cluster.share / (job.f * job.forward) / job.decode


def asked(images: int, f: float, forward: float, cluster: Cluster) -> float:
    """GPU-hours of evaluation or certification: ``f`` forward passes' worth for each of ``images`` images. It divides freely by images."""
    return images * f * forward / (cluster.peak * cluster.share) / 3600


def shared(images: int, chunk: int, gpus: int) -> float:
    """How even the shards are: the mean of the chunks a GPU gets, by the most that one gets."""
    chunks = math.ceil(images / chunk)
    return chunks / gpus / math.ceil(chunks / gpus)


def at_shares(cluster: Cluster, figure: Callable[[Cluster], float], shares: tuple[float, ...] = SHARES) -> list[float]:
    """A figure for each assumed share of the peak, the best first."""
    return [figure(replace(cluster, share=share)) for share in shares]
