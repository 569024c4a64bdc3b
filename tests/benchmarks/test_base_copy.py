"""What peers read: the values our base computes with, bit for bit, and nothing made for another base."""

from __future__ import annotations

import gguf
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapterhub.base.identity import Base, describe_base
from adapterhub.base.loading import load_model, load_tokenizer
from adapterhub.errors import UserInputError
from benchmarks.adapters import adapter_set, write_missing
from benchmarks.base_copy import base_cache, write_copy, write_gguf
from tests.support.tiny_models import VOCAB_SIZE, build_base


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Base:
    return build_base(tmp_path_factory.mktemp("base"), quantization="nf4")


def published_gguf(path, base, *, family="llama", extra=()):
    """A GGUF file of the same shapes as `base` whose weights are all zero, as a publisher would have written it."""
    config = load_model(base).config
    writer = gguf.GGUFWriter(path, family)
    writer.add_file_type(3)
    writer.add_languages(["en"])
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCAB_SIZE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for key, value in load_model(base).state_dict().items():
        writer.add_tensor(names.get_name(key, try_suffixes=(".weight",)), torch.zeros_like(value).numpy())
    for name in extra:
        writer.add_tensor(name, torch.zeros(4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def same_values(found, base):
    wanted = load_model(base).state_dict()
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_the_copy_holds_the_dequantized_values_and_the_tokenizer(base, tmp_path):
    folder = write_copy(base, tmp_path)
    copy = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    assert copy.dtype == torch.float32
    assert same_values(copy.state_dict(), base)
    assert not same_values(load_model(describe_base("x", base.folder, "none")).state_dict(), base)
    text = "One sentence."
    assert AutoTokenizer.from_pretrained(folder)(text) == load_tokenizer(base)(text)


def test_llama_cpp_gets_the_same_values_as_another_reader_shows(base, tmp_path):
    original = published_gguf(tmp_path / "published.gguf", base)
    copy = write_gguf(base, tmp_path, original=original)
    found = AutoModelForCausalLM.from_pretrained(copy.parent, gguf_file=copy.name, dtype=torch.float32)
    assert same_values(found.state_dict(), base)
    assert gguf.GGUFReader(copy).fields["general.file_type"].contents() == 0
    assert gguf.GGUFReader(copy).fields["general.languages"].contents() == ["en"]


def test_a_copy_is_written_once_and_never_for_another_base(base, tmp_path):
    first = write_copy(base, tmp_path)
    (first / "mark").touch()
    assert (write_copy(base, tmp_path) / "mark").is_file()
    other = describe_base(base.name, base.folder, "none")
    assert not (write_copy(other, tmp_path) / "mark").exists()
    assert base_cache(other, tmp_path) != base_cache(base, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"family": "phi3"}, r"published\.gguf' is of the family 'phi3', not 'llama'\. Leave llama\.cpp out"),
        ({"extra": ["rope_freqs.weight"]}, r"holds a tensor 'rope_freqs\.weight' that the base does not have"),
    ],
)
def test_a_gguf_file_that_does_not_fit_is_refused_and_leaves_no_copy(base, tmp_path, options, message):
    original = published_gguf(tmp_path / "published.gguf", base, **options)
    with pytest.raises(UserInputError, match=message):
        write_gguf(base, tmp_path, original=original)
    assert not (base_cache(base, tmp_path) / "float32.gguf").exists()


def test_magnitudes_of_dora_are_the_norms_of_the_values_that_are_served(base, tmp_path):
    dora = adapter_set("mixed", 3, folder=base_cache(base, tmp_path))[2]
    write_missing([dora], base)
    tensors = load_file(f"{dora.folder}/adapter_model.safetensors")
    weights = load_model(base).state_dict()
    magnitudes = {name: value for name, value in tensors.items() if "magnitude" in name}
    assert len(magnitudes) == len(base.modules)
    for name, value in magnitudes.items():
        module = name.removeprefix("base_model.model.").partition(".lora_magnitude_vector")[0]
        torch.testing.assert_close(value, weights[f"{module}.weight"].norm(dim=1))
