"""Publishing: what becomes a version, what is refused, and which content is the same."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from adapterhub.base.catalogue import CATALOGUE
from adapterhub.base.identity import Base
from adapterhub.base.loading import load_model
from adapterhub.errors import (
    AdapterConfigError,
    AdapterHubError,
    AdapterMismatchError,
    AdapterWeightsError,
    BaseMismatchError,
    InvalidNameError,
    JobFailedError,
    UserInputError,
)
from adapterhub.records import EvaluationRecord, TrainingRecord
from adapterhub.store import Limits, PublishStep, Store
from tests.support.adapters import METHODS, open_with_peft, write_adapter
from tests.support.peft_folders import LORA_CONFIG, lora_tensors, small_base, write_folder
from tests.support.tiny_models import build_base

NewFolder = Callable[[int], Path]


def _training(**changes: Any) -> TrainingRecord:
    record = TrainingRecord(
        code_revision="abc-dirty",
        recipe={"seed": 1, "lr": 5e-4},
        data_digests={"train.jsonl": "d" * 64},
        token_digest="e" * 64,
        seed=1,
        packages={"torch": "2"},
        hardware={"cpu": "x"},
        wall_time_s=1.5,
        num_train_tokens=10,
        num_trainable_parameters=20,
        metrics=(),
    )
    return record.model_copy(update=changes)


EVALUATION = EvaluationRecord(
    metric="rouge_l", num_rows=96, base_score=0.1, adapter_score=0.16, difference=0.06, interval_low=0.04,
    interval_high=0.08, seed=1, data_digest="f" * 64,
)  # fmt: skip


def _num_files(store_root: Path, kind: str) -> int:
    return sum(path.is_file() for path in (store_root / kind).rglob("*"))


@pytest.mark.parametrize("method", METHODS)
def test_a_folder_of_every_method_is_published_and_opens_with_peft(method: str, store: Store, tmp_path: Path) -> None:
    base = build_base(tmp_path / "base")
    folder = write_adapter(tmp_path / "adapter", base, method=method, rank=4, pruned=method == "adalora")
    version = store.publish(folder, task="summarize", base=base)
    view = store.view(version.serving_digest)
    import torch

    tokens = torch.arange(6).unsqueeze(0)
    expected = open_with_peft(load_model(base), folder)(tokens).logits
    assert torch.equal(open_with_peft(load_model(base), view)(tokens).logits, expected)
    assert not torch.equal(load_model(base)(tokens).logits, expected)
    store.verify(version.label)
    assert store.manifest(version).method == version.method == method


def test_the_first_version_becomes_stable_and_later_ones_do_not(
    store: Store, base: Base, new_folder: NewFolder
) -> None:
    first, second = (store.publish(new_folder(seed), task="summarize", base=base) for seed in (1, 2))
    assert [version.label for version in store.versions()] == ["summarize@v1", "summarize@v2"]
    assert store.get_version("summarize") == first
    assert store.get_version("summarize@v2") == second
    assert [(alias.name, alias.number, alias.generation) for alias in store.aliases()] == [("stable", 1, 1)]
    assert store.tasks() == ["summarize"]


def test_equal_content_is_the_same_version(store: Store, base: Base, folder: Path) -> None:
    records = {"training": _training(), "evaluation": EVALUATION}
    first = store.publish(folder, task="summarize", base=base, **records)
    assert store.publish(folder, task="summarize", base=base, **records) == first
    assert len(store.versions()) == len(store.log()) == 1


def test_other_evidence_for_the_same_weights_is_another_version_that_serves_alike(
    store: Store, base: Base, folder: Path
) -> None:
    first = store.publish(folder, task="summarize", base=base)
    second = store.publish(folder, task="summarize", base=base, training=_training())
    assert (first.serving_digest, second.number) == (second.serving_digest, 2)
    assert store.get_version(f"sha256:{first.serving_digest}") == first


def test_the_manifest_keeps_the_evidence(store: Store, base: Base, folder: Path) -> None:
    training = _training()
    version = store.publish(folder, task="summarize", base=base, training=training, evaluation=EVALUATION)
    manifest = store.manifest(version)
    assert (manifest.training, manifest.evaluation, manifest.base) == (training, EVALUATION, base.record())
    assert (manifest.rank, manifest.alpha, manifest.target_modules) == (2, 4.0, ("q_proj", "v_proj"))


def test_the_serving_digest_ignores_file_layout_but_not_values(store: Store, base: Base, tmp_path: Path) -> None:
    tensors = lora_tensors()
    turned = dict(reversed(tensors.items()))
    config = LORA_CONFIG | {"lora_dropout": 0.3, "target_modules": ["v_proj", "q_proj"]}
    plain = store.publish(write_folder(tmp_path / "a"), task="t", base=base)
    same = store.publish(
        write_folder(tmp_path / "b", tensors=turned, config=config, metadata={"x": "y"}), task="t", base=base
    )
    assert same.serving_digest == plain.serving_digest
    name = next(iter(tensors))
    tensors[name][0, 0] += np.float32(1e-6)
    others = [
        store.publish(write_folder(tmp_path / "c", tensors=tensors), task="t", base=base),
        store.publish(write_folder(tmp_path / "d", config=LORA_CONFIG | {"lora_alpha": 5}), task="t", base=base),
        store.publish(tmp_path / "a", task="t", base=small_base(digest="9" * 64)),
    ]
    assert len({version.serving_digest for version in [plain, *others]}) == 4


def test_the_view_holds_a_configuration_that_names_no_base_and_runs_no_code(
    store: Store, base: Base, tmp_path: Path
) -> None:
    config = LORA_CONFIG | {
        "base_model_name_or_path": "../../etc",
        "auto_mapping": {"base_model_class": "X", "parent_library": "transformers.models.llama"},
    }
    version = store.publish(write_folder(tmp_path / "a", config=config), task="summarize", base=base, trust_base=True)
    view = store.view(version.serving_digest)
    written = json.loads((view / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] is None
    assert "auto_mapping" not in written
    assert json.loads((view / "adapterhub.json").read_text()) == {
        "task": "summarize",
        "version": 1,
        "serving_digest": version.serving_digest,
        "manifest_digest": version.manifest_digest,
        "base_digest": base.digest,
    }


def test_stored_files_are_read_only_and_named_by_their_content(
    store: Store, base: Base, folder: Path, tmp_path: Path
) -> None:
    store.publish(folder, task="summarize", base=base)
    for kind in ("blobs", "manifests"):
        for path in (tmp_path / "store" / kind / "sha256").glob("*/*"):
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            assert (path.name, path.parent.name) == (digest, digest[:2])
            assert stat.S_IMODE(path.stat().st_mode) == 0o444
    assert not list((tmp_path / "store" / "tmp").iterdir())


def test_steps_are_reported_in_order(store: Store, base: Base, folder: Path) -> None:
    steps: list[PublishStep] = []
    store.publish(folder, task="summarize", base=base, on_step=steps.append)
    assert steps == list(PublishStep)


@pytest.mark.parametrize("name", ["adapter_model.bin", "training_args.BIN", "optimizer.pt", "x.pkl", "x.pth", "x.ckpt"])
def test_a_folder_with_a_pickle_is_refused_by_its_name(name: str, store: Store, base: Base, folder: Path) -> None:
    (folder / name).write_bytes(b"")
    with pytest.raises(AdapterWeightsError) as caught:
        store.publish(folder, task="summarize", base=base)
    assert f"holds pickle files, which can run any code when loaded: {name}." in caught.value.what
    assert "safetensors" in caught.value.hint


def _no_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


def _no_config(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


def _bad_json(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"r": 1, "r": 2}')


def _json_list(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("[]")


def _big_config(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(" " * (8 << 20) + "{}")


def _bad_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"x")


def _nan(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = np.nan
    write_folder(folder, tensors=tensors)


def _wrong_shape(folder: Path) -> None:
    write_folder(folder, tensors=lora_tensors(rank=3))


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (_no_weights, AdapterConfigError, "is no PEFT adapter folder: it lacks adapter_model.safetensors."),
        (_no_config, AdapterConfigError, "is no PEFT adapter folder: it lacks adapter_config.json."),
        (_bad_json, AdapterConfigError, "adapter_config.json is not valid JSON: the key 'r' occurs twice."),
        (_json_list, AdapterConfigError, "adapter_config.json holds no JSON object."),
        (_big_config, AdapterConfigError, "adapter_config.json has 8,388,610 bytes; allowed: 8,388,608."),
        (_bad_weights, AdapterWeightsError, "The weight file has 1 bytes; a safetensors file has at least 8."),
        (_nan, AdapterWeightsError, "holds NaN or infinity."),
        (_wrong_shape, AdapterMismatchError, "rank 2 on a module with 8 outputs and 8 inputs needs (2, 8)."),
    ],
)
def test_a_bad_folder_leaves_nothing_behind(
    spoil: Callable[[Path], None], error: type[AdapterHubError], message: str, store: Store, base: Base, folder: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    spoil(folder)
    with pytest.raises(error) as caught:
        store.publish(folder, task="summarize", base=base)
    assert message in caught.value.what
    assert (store.versions(), store.log_head()) == ([], 0)
    assert [_num_files(tmp_path / "store", kind) for kind in ("blobs", "manifests", "views", "tmp")] == [0, 0, 0, 0]


def test_a_missing_folder_is_named(store: Store, base: Base, tmp_path: Path) -> None:
    with pytest.raises(AdapterConfigError, match=r"nowhere' is not a folder\. Name the folder PEFT's"):
        store.publish(tmp_path / "nowhere", task="summarize", base=base)


def test_a_weight_file_that_grows_past_the_cap_is_refused(base: Base, folder: Path, tmp_path: Path) -> None:
    limits = Limits(file_bytes=100)
    with Store.open(tmp_path / "small", limits=limits) as store, pytest.raises(AdapterWeightsError) as caught:
        store.publish(folder, task="summarize", base=base)
    assert str(caught.value) == "'adapter_model.safetensors' has more than 100 bytes. Lower the rank."


def test_an_adapter_made_for_another_base_is_refused(store: Store, base: Base, folder: Path) -> None:
    version = store.publish(folder, task="summarize", base=base)
    exported = store.export(version.label, folder.parent / "exported")
    other = dataclasses.replace(base, name="other", digest="a" * 64, quantization="nf4")
    with pytest.raises(BaseMismatchError) as caught:
        store.publish(exported, task="summarize", base=other)
    assert caught.value.what == (
        "The adapter was made for base sha256:bbbbbbbbbbbb, "
        "not for 'other' with quantization 'nf4' (sha256:aaaaaaaaaaaa)."
    )
    assert caught.value.hint == "Name the right base with `--base` and `--quantization`, or train again on this one."


@pytest.mark.parametrize(
    "stated", ["org/Other-1B", "Other-1B", "/mnt/models/Other-1B/", "C:\\models\\Other-1B", "../Other-1B", 7]
)
def test_a_plain_peft_folder_that_names_another_base_is_refused_unless_the_base_is_trusted(
    stated: object, store: Store, base: Base, tmp_path: Path
) -> None:
    folder = write_folder(tmp_path / "a", config=LORA_CONFIG | {"base_model_name_or_path": stated})
    with pytest.raises(BaseMismatchError) as caught:
        store.publish(folder, task="summarize", base=base)
    assert caught.value.what == f"adapter_config.json says the adapter was made for {stated!r}, not for 'small'."
    assert caught.value.hint == "Name the right base with `--base`, or add `--trust-base` when both are the same model."
    assert store.versions() == []
    assert store.publish(folder, task="summarize", base=base, trust_base=True).base_digest == base.digest


@pytest.mark.parametrize(
    "stated", [None, "", "org/Small", "SMALL", "/mnt/models/small/", "C:\\models\\Small", "hub/folder-1"]
)
def test_a_plain_peft_folder_that_names_its_base_or_the_folder_of_it_is_published(
    stated: object, store: Store, base: Base, tmp_path: Path
) -> None:
    base = dataclasses.replace(base, name="org/small", folder=Path("/bases/Folder-1"))
    folder = write_folder(tmp_path / "a", config=LORA_CONFIG | {"base_model_name_or_path": stated})
    assert store.publish(folder, task="summarize", base=base).base_digest == base.digest


def test_a_long_name_of_another_base_is_shortened(store: Store, base: Base, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", config=LORA_CONFIG | {"base_model_name_or_path": "x" * 1000})
    with pytest.raises(BaseMismatchError) as caught:
        store.publish(folder, task="summarize", base=base)
    assert len(caught.value.what) < 250


def test_trusting_the_base_does_not_overrule_a_recorded_digest(store: Store, base: Base, folder: Path) -> None:
    (folder / "adapterhub.json").write_text(json.dumps({"base_digest": "a" * 64}))
    with pytest.raises(BaseMismatchError, match="The adapter was made for base sha256:aaaaaaaaaaaa"):
        store.publish(folder, task="summarize", base=base, trust_base=True)


@pytest.mark.parametrize(
    "task", ["", "Summarize", "-x", "a/b", "../x", "x" * 64, "a\n", "%2e%2e", "a#b", "a\0b", "sümme", "a@b"]
)
def test_a_task_name_that_could_be_a_path_is_refused(task: str, store: Store, base: Base, folder: Path) -> None:
    with pytest.raises(InvalidNameError) as caught:
        store.publish(folder, task=task, base=base)
    assert caught.value.what.endswith("cannot name a task.")
    assert caught.value.hint == (
        "Allowed: 1 to 63 characters of a-z, 0-9, dot, dash and underscore, the first a letter or digit."
    )


@pytest.mark.parametrize("task", ["auto", "base", *CATALOGUE])
def test_a_task_name_with_another_meaning_in_requests_is_refused(
    task: str, store: Store, base: Base, folder: Path
) -> None:
    with pytest.raises(
        InvalidNameError, match=f"'{task}' cannot name a task: in requests it means something else"
    ) as caught:
        store.publish(folder, task=task, base=base)
    assert caught.value.hint == "Reserved: auto, base, smollm2-135m-instruct; choose another name."


@pytest.mark.parametrize("actor", ["", "  ", "x" * 1001, "\ud800"])
def test_an_actor_the_log_cannot_hold_is_refused(actor: str, store: Store, base: Base, folder: Path) -> None:
    with pytest.raises(InvalidNameError, match=r"The actor .* cannot be logged. Allowed: 1 to 1000 characters"):
        store.publish(folder, task="summarize", base=base, actor=actor)


@pytest.mark.parametrize("changes", [{"wall_time_s": float("nan")}, {"recipe": {"lr": float("inf")}}, {"seed": 2**60}])
def test_a_record_that_canonical_json_cannot_hold_is_refused(
    changes: dict[str, Any], store: Store, base: Base, folder: Path
) -> None:
    with pytest.raises(
        UserInputError, match=r"The manifest cannot be written as canonical JSON: .* Numbers must be finite"
    ):
        store.publish(folder, task="summarize", base=base, training=_training(**changes))
    assert store.versions() == []


def test_a_disk_error_is_reported_with_the_store(store: Store, base: Base, folder: Path) -> None:
    def fail(_step: PublishStep) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(JobFailedError, match=r"No space left on device. Free some space and try again."):
        store.publish(folder, task="summarize", base=base, on_step=fail)


def test_an_export_is_a_peft_folder_and_republishing_it_serves_alike(store: Store, base: Base, folder: Path) -> None:
    version = store.publish(folder, task="summarize", base=base)
    target = folder.parent / "new" / "exported"
    assert store.export("summarize", target) == target
    assert sorted(path.name for path in target.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "adapterhub.json",
    ]
    assert store.publish(target, task="other", base=base).serving_digest == version.serving_digest
    with pytest.raises(UserInputError, match=r"exported' exists and is not an empty folder\. Name a new folder\."):
        store.export("summarize", target)
