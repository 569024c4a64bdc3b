"""The base: identity, quantization, and the messages when it is not there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft.utils.integrations import dequantize_module_weight

from adapterhub.assets import Asset
from adapterhub.base import Base, catalogue, describe_base
from adapterhub.base.catalogue import find_base, list_bases, pull_base
from adapterhub.base.loading import load_model, load_tokenizer
from adapterhub.base.prompts import chat_token_ids, stop_token_ids
from adapterhub.errors import AssetChecksumError, AssetFetchError, BaseNotPulledError, RequestError, UserInputError
from adapterhub.settings import Settings, load_settings
from tests.support.tiny_models import build_base


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings(home=tmp_path / "home")


def test_the_digest_changes_with_weights_tokenizer_template_and_quantization_and_with_nothing_else(
    tmp_path: Path,
) -> None:
    base = build_base(tmp_path / "a")
    copy = tmp_path / "b"
    shutil.copytree(base.folder, copy, ignore=shutil.ignore_patterns(".adapterhub*"))
    assert describe_base("other-name", copy, "none").digest == base.digest

    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"transformers_version": "0.0"}))
    tokenizer = json.loads((copy / "tokenizer_config.json").read_text())
    circumstances = {"local_files_only": True, "is_local": False, "name_or_path": "/somewhere"}
    (copy / "tokenizer_config.json").write_text(json.dumps(tokenizer | circumstances))
    assert describe_base("b", copy, "none").digest == base.digest

    digests = {base.digest, describe_base("b", copy, "nf4").digest, describe_base("b", copy, "int8").digest}
    digests.add(build_base(tmp_path / "c", seed=1).digest)
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    digests.add(describe_base("b", copy, "none").digest)
    (copy / "tokenizer.json").write_text((copy / "tokenizer.json").read_text() + "\n")
    digests.add(describe_base("b", copy, "none").digest)
    assert len(digests) == 6


@pytest.mark.parametrize(
    "name",
    ["special_tokens_map.json", "added_tokens.json", "spiece.model", "vocab.txt", "qwen.tiktoken", "tokenizer_v2.json"],
)
def test_every_tokenizer_file_enters_the_digest_and_a_readme_does_not(name: str, tmp_path: Path) -> None:
    base = build_base(tmp_path / "a")
    (base.folder / "README.md").write_text("a base")
    assert describe_base("a", base.folder, "none").digest == base.digest
    digests = {base.digest}
    for content in ("{}", '{"eos_token": "x"}'):
        (base.folder / name).write_text(content)
        digests.add(describe_base("a", base.folder, "none").digest)
    assert len(digests) == 3


def test_a_weight_file_changed_in_place_changes_the_digest(tmp_path: Path) -> None:
    base = build_base(tmp_path / "a")
    weights = base.folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert describe_base("a", base.folder, "none").digest != base.digest


def test_modules_are_the_linears_an_adapter_may_target(tmp_path: Path) -> None:
    base = build_base(tmp_path / "a")
    model = load_model(base)
    linears = {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    assert base.modules == linears


def test_the_plain_copy_holds_exactly_the_nf4_values(tmp_path: Path) -> None:
    base = build_base(tmp_path / "a", quantization="nf4")
    plain = load_model(base)
    packed = load_model(base, keep_quantized=True)
    num_compared = 0
    for name, module in packed.named_modules():
        if isinstance(module, Linear4bit):
            copy = plain.get_submodule(name)
            assert torch.equal(copy.weight, dequantize_module_weight(module).float())
            num_compared += 1
    assert num_compared == len(base.modules)
    assert not any(isinstance(module, Linear4bit) for module in plain.modules())


@pytest.mark.parametrize(("quantization", "bound"), [("nf4", 0.2), ("int8", 0.01), ("none", 0.0)])
def test_quantization_moves_weights_by_no_more_than_its_step(tmp_path: Path, quantization: str, bound: float) -> None:
    folder = build_base(tmp_path / "a").folder
    exact = load_model(describe_base("a", folder, "none"))
    rounded = load_model(describe_base("a", folder, quantization))  # pyright: ignore[reportArgumentType]
    name = "model.layers.0.mlp.up_proj"
    original, changed = exact.get_submodule(name).weight, rounded.get_submodule(name).weight
    error = float((original - changed).abs().max() / original.abs().max())
    assert error <= bound
    assert (error > 0) == (quantization != "none")


def test_a_base_that_was_not_pulled_says_how_to_get_it(settings: Settings) -> None:
    with pytest.raises(BaseNotPulledError, match="Run `hub base pull smollm2-135m-instruct`"):
        find_base(None, settings)


def test_an_unknown_base_gets_the_near_match(settings: Settings) -> None:
    with pytest.raises(
        BaseNotPulledError, match=r"Unknown base 'smollm2-135m'.* Did you mean 'smollm2-135m-instruct'\?"
    ):
        find_base("smollm2-135m", settings)


def test_a_local_folder_is_a_base(settings: Settings, tmp_path: Path) -> None:
    folder = build_base(tmp_path / "a").folder
    assert find_base(str(folder), settings).digest == describe_base("x", folder, "nf4").digest
    assert pull_base(str(folder), settings).folder == folder


def test_a_folder_of_pickles_is_refused(settings: Settings, tmp_path: Path) -> None:
    folder = build_base(tmp_path / "a").folder
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserInputError, match=r"holds no \*.safetensors file.* convert pickle checkpoints"):
        find_base(str(folder), settings)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", "{", "config.json is not valid JSON"),
        ("config.json", "[]", "config.json holds no JSON object"),
        ("model.safetensors", "version https://git-lfs.github.com/spec/v1", "fetch the real file"),
        ("model.safetensors", "", "is no safetensors file"),
    ],
)
def test_a_damaged_base_is_named_by_file(
    settings: Settings, tmp_path: Path, file: str, content: str, message: str
) -> None:
    folder = build_base(tmp_path / "a").folder
    (folder / file).write_text(content)
    with pytest.raises(UserInputError, match=message):
        find_base(str(folder), settings)


def test_a_home_that_cannot_be_written_ends_in_a_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    environment = {**os.environ, "ADAPTERHUB_HOME": str(tmp_path / "file")}
    command = [sys.executable, "-c", "from adapterhub.cli import main; main()", "base", "pull"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "error (system)" in done.stderr
    assert "ADAPTERHUB_HOME moves" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_pull_with_a_wrong_checksum_leaves_no_base(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF but not the right one")
    original = catalogue.CATALOGUE["smollm2-135m-instruct"]
    fake = Asset(**{**original.model_dump(), "source": "file", "location": str(bad), "member": ""})
    monkeypatch.setitem(catalogue.CATALOGUE, "smollm2-135m-instruct", fake)
    with pytest.raises(AssetChecksumError, match=f"expected {original.sha256}"):
        pull_base(None, settings)
    assert [path for path in settings.home.rglob("*") if path.is_file()] == []
    assert not list_bases(settings)[0].is_pulled


def test_a_folder_called_like_a_base_is_never_removed(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("smollm2-135m-instruct", "org/model"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "notes.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BaseNotPulledError):
        find_base("smollm2-135m-instruct", settings)
    with pytest.raises(UserInputError, match=r"is no base: it has no config.json"):
        pull_base("org/model", settings)
    assert (tmp_path / "org/model/notes.txt").read_text() == "mine"


def test_a_hub_base_without_network_is_reported_and_leaves_nothing(settings: Settings) -> None:
    with pytest.raises(AssetFetchError, match="Could not fetch base 'org/model' from the hub"):
        pull_base("org/model", settings)
    assert list(settings.bases_dir.iterdir()) == []


def test_chat_prompts_are_rendered_with_the_template_of_the_base(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(build_base(tmp_path / "a"))
    ids = chat_token_ids(tokenizer, [{"role": "user", "content": "Hi"}])
    assert tokenizer.decode(ids) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in stop_token_ids(tokenizer)


def test_a_base_without_chat_template_and_a_template_that_refuses_are_reported(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(build_base(tmp_path / "a"))
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(RequestError, match=r"The chat template refused the messages: roles must alternate"):
        chat_token_ids(tokenizer, [{"role": "user", "content": "Hi"}])
    tokenizer.chat_template = None
    with pytest.raises(RequestError, match="This base has no chat template"):
        chat_token_ids(tokenizer, [{"role": "user", "content": "Hi"}])


@pytest.mark.real_base
def test_the_real_base_answers(real_base: Base) -> None:
    base = real_base
    tokenizer, model = load_tokenizer(base), load_model(base)
    ids = torch.tensor([chat_token_ids(tokenizer, [{"role": "user", "content": "What is the capital of France?"}])])
    mask = torch.ones_like(ids)
    answer = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, ids.shape[1] :])
    assert len(base.modules) == 30 * 7
