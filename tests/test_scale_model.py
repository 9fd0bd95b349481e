"""The model of training on many GPUs: against sums worked out by hand, and by trying every number of GPUs."""

from dataclasses import replace

import pytest
from scale_model import (
    Cluster,
    Job,
    all_reduce,
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
from scale_tables import jobs, scale_table

CLUSTER = Cluster(peak=1000.0, share=0.5, gpus_per_host=4, cores_per_gpu=2, within=100.0, between=10.0, latency=0.5, launch=0.01)
JOB = Job(name="toy", forward=5.0, f=10.0, kernels=10, parameters=25, decode=4.0, batch=64, images=640, epochs=3, overlap=False, readers=8)


def test_the_parts_of_a_step() -> None:
    # 16 images x 10 x 5 operations at 500 a second; 16 images from 2 cores at 4 each; 100 bytes around a ring of 4 at 100 a second
    assert parts(JOB, CLUSTER, 4) == pytest.approx(
        {"arithmetic": 1.6, "kernel launches": 0.0, "data": 2.0, "all-reduce": 2 * 3 / 4 * 1.0 + 2 * 3 * 0.5}
    )


def test_kernels_are_waited_for_only_beyond_the_arithmetic() -> None:
    slow = replace(JOB, kernels=200)  # 2 seconds of launches beside 1.6 of arithmetic
    assert parts(slow, CLUSTER, 4)["kernel launches"] == pytest.approx(0.4)


def test_readers_bound_the_cores_that_decode() -> None:
    assert parts(replace(JOB, readers=1), CLUSTER, 4)["data"] == pytest.approx(4.0)


def test_a_ring_crosses_hosts_at_the_slower_link_and_one_gpu_needs_none() -> None:
    assert all_reduce(100, CLUSTER, 1) == 0
    assert all_reduce(100, CLUSTER, 2) == pytest.approx(2 * 1 / 2 * 1.0 + 2 * 0.5)
    assert all_reduce(100, CLUSTER, 8) == pytest.approx(2 * 7 / 8 * 10.0 + 2 * 7 * 0.5)


def test_overlap_hides_the_shorter_of_data_and_arithmetic() -> None:
    assert step_seconds(JOB, CLUSTER, 1) == pytest.approx(6.4 + 8.0)
    assert step_seconds(replace(JOB, overlap=True), CLUSTER, 1) == pytest.approx(8.0)
    assert step_seconds(replace(JOB, overlap=True, decode=40.0), CLUSTER, 1) == pytest.approx(6.4)


def test_hours_are_steps_times_seconds() -> None:
    assert wall_hours(JOB, CLUSTER, 1) == pytest.approx(30 * 14.4 / 3600)  # 3 epochs of 10 steps
    assert gpu_hours(JOB, CLUSTER, 4) == pytest.approx(4 * wall_hours(JOB, CLUSTER, 4))


def test_scaling_is_perfect_where_nothing_is_communicated() -> None:
    free = replace(CLUSTER, latency=0.0, within=1e12, between=1e12)
    assert [scaling(JOB, free, n) for n in (1, 2, 16)] == pytest.approx([1, 1, 1], abs=1e-6)
    assert scaling(JOB, CLUSTER, 16) < scaling(JOB, CLUSTER, 4) < scaling(JOB, CLUSTER, 1) == 1


@pytest.mark.parametrize("least", [0.1, 0.3, 0.5, 0.9])
def test_saturation_is_the_last_number_that_still_scales(least: float) -> None:
    fine = [n for n in range(1, 33) if 64 % n == 0 and scaling(JOB, CLUSTER, n) >= least]
    assert saturation(JOB, CLUSTER, least) == fine[-1]


def test_the_batch_bounds_the_number_of_gpus() -> None:
    free = replace(CLUSTER, latency=0.0, within=1e12, between=1e12)
    assert saturation(JOB, free) == 32  # two images each


def test_what_hinders() -> None:
    assert hindrance(JOB, CLUSTER, 8) == "all-reduce"
    assert hindrance(replace(JOB, kernels=1e6), CLUSTER, 8) == "kernel launches"
    # 48 GPUs get 2 of 64 images where 4/3 would be even: that costs .067 s of arithmetic and .083 s of decoding, unless it is hidden
    free = replace(CLUSTER, latency=0.0, within=1e12, between=1e12)
    assert hindrance(JOB, free, 48) == "data"
    assert hindrance(replace(JOB, overlap=True), free, 48) == "arithmetic"


def test_cores_that_keep_up() -> None:
    assert cores_needed(JOB, CLUSTER) == pytest.approx(10 / 4)  # 10 images a second, 4 of them a core


def test_evaluation_divides_by_chunks() -> None:
    assert asked(7200, 2.0, 5.0, CLUSTER) == pytest.approx(7200 * 10 / 500 / 3600)
    assert shared(5000, 50, 64) == pytest.approx(100 / 64 / 2)
    assert shared(6400, 50, 64) == 1


def test_shares_of_the_peak() -> None:
    assert at_shares(CLUSTER, lambda c: c.share, (0.4, 0.2)) == [0.4, 0.2]


def test_the_tables_hold_what_the_model_gives() -> None:
    document = {
        "command": "scale_measure.py",
        "commit": "c",
        "date": "d",
        "hardware": "h",
        "versions": {"torch": "2"},
        "recipe": {"name": "r", "batch": 4096},
        "model": {"parameters": 32_000_000},
        "gflop": {"forward": 14.0, "training": 42.0},
        "operators": {"forward": 400, "training": 1200},
        "steps": {"train": {"f": 6.5, "epochs": 5}, "finetune": {"f": 9.0, "epochs": 1}, "clean": {"f": 3.0, "epochs": 5}},
        "peak_gflops": {"bf16": 420.0},
        "training_pass": {"precision": "bf16", "seconds_per_image": {"median": 0.25}},
        "decode": {"bytes": [100_000, 120_000], "random_resized_crop": 400.0, "folder_reader": 380.0},
        "checkpoint": {"seconds": 1.0, "bytes": 512_000_000},
        "asked": {"clean": 1.0},
    }
    text = scale_table(document)
    assert jobs(document)["finetune"].kernels == 3600  # nine forward passes' worth, of which a forward and backward pass is three
    job = Job("train stage", 14e9, 6.5, 2600, 32_000_000, 400.0, batch=4096)
    assert "168 GFLOP/s, 40 % of the peak" in text
    assert f"| 64 | 64 | {1e3 * parts(job, Cluster(), 64)['arithmetic']:.1f} |" in text
    steps = [step_seconds(replace(job, overlap=ahead), Cluster(), 64) for ahead in (True, False)]
    assert f"{1e3 * steps[0]:.1f} | {1e3 * steps[1]:.1f} | {100 * scaling(job, Cluster(), 64):.0f} |" in text
