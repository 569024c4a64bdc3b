"""Several writers, and writers that are killed: all or nothing, and no number given twice."""

from __future__ import annotations

import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from adapterhub.base.identity import Base
from adapterhub.errors import ConflictError
from adapterhub.store import PublishStep, Store
from tests.support.peft_folders import small_base, write_folder
from tests.support.publishers import PublishJob, run_publishers

NUM_WRITERS = 8


def _assert_sound(store: Store, num_versions: int) -> None:
    assert [version.number for version in store.versions()] == list(range(1, num_versions + 1))
    assert store.find_damage() == {}
    assert store.verify_log() == min(num_versions, 1)
    for version in store.versions():
        assert (store.view(version.serving_digest) / "adapter_model.safetensors").is_file()


def test_threads_that_publish_the_same_get_the_same_version(store: Store, base: Base, folder: Path) -> None:
    with ThreadPoolExecutor(NUM_WRITERS) as pool:
        jobs = [pool.submit(store.publish, folder, task="summarize", base=base) for _ in range(NUM_WRITERS)]
    assert {job.result().label for job in jobs} == {"summarize@v1"}
    _assert_sound(store, 1)


def test_threads_that_publish_different_adapters_get_different_numbers(
    store: Store, base: Base, new_folder: Callable[[int], Path]
) -> None:
    folders = [new_folder(seed) for seed in range(NUM_WRITERS)]
    with ThreadPoolExecutor(NUM_WRITERS) as pool:
        jobs = [pool.submit(store.publish, folder, task="summarize", base=base) for folder in folders]
    assert sorted(job.result().number for job in jobs) == list(range(1, NUM_WRITERS + 1))
    _assert_sound(store, NUM_WRITERS)


def test_processes_that_open_and_publish_at_once_agree(tmp_path: Path, new_folder: Callable[[int], Path]) -> None:
    seeds = [0, 1, 2, 3] * 2
    jobs = [PublishJob(str(tmp_path / "store"), str(new_folder(seed))) for seed in seeds]
    numbers = run_publishers(jobs)
    assert numbers[:4] == numbers[4:]
    assert sorted(numbers[:4]) == [1, 2, 3, 4]
    with Store.open(tmp_path / "store") as store:
        _assert_sound(store, 4)


def test_of_threads_that_move_an_alias_one_wins(store: Store, base: Base, folder: Path) -> None:
    store.publish(folder, task="summarize", base=base)

    def move(writer: int) -> bool:
        try:
            store.set_alias("summarize", "stable", "v1", expected_generation=1, actor=f"w{writer}", reason="race")
        except ConflictError:
            return False
        return True

    with ThreadPoolExecutor(NUM_WRITERS) as pool:
        assert sum(pool.map(move, range(NUM_WRITERS))) == 1
    assert store.verify_log() == 2


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One store per step, in which a publish was killed right after that step."""
    roots = {step: tmp_path_factory.mktemp(step) for step in PublishStep}
    jobs = [
        PublishJob(str(root / "store"), str(write_folder(root / "adapter")), last_step=step)
        for step, root in roots.items()
    ]
    assert run_publishers(jobs) == [-signal.SIGKILL] * len(roots)
    return roots


@pytest.mark.parametrize("step", list(PublishStep))
def test_a_publish_killed_after_any_step_leaves_all_or_nothing(step: PublishStep, killed: dict[str, Path]) -> None:
    is_visible = step in (PublishStep.COMMITTED, PublishStep.VIEWED)
    with Store.open(killed[step] / "store") as store:
        _assert_sound(store, 1 if is_visible else 0)
        version = store.publish(killed[step] / "adapter", task="summarize", base=small_base())
        assert version.label == "summarize@v1"
        _assert_sound(store, 1)
