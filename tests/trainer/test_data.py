from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from adapterhub.base.loading import load_tokenizer
from adapterhub.base.prompts import chat_token_ids
from adapterhub.errors import DataError
from adapterhub.recipes import Recipe, Split, default_recipe, parse_recipe
from tests.support.tiny_models import build_base
from tests.support.training import tiny_recipe, write_jsonl, write_task
from trainer.data import prepare
from trainer.data.batches import collate, plan_batches
from trainer.data.rows import Example, read_examples
from trainer.data.split import deduplicate, normalise, split_rows
from trainer.data.tokens import IGNORED, TokenRow, encode, masked_sample, rows_digest

FREE = default_recipe("mytask", Path("rows.jsonl"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return load_tokenizer(build_base(tmp_path_factory.mktemp("base")))


def field_recipe(**changes: Any) -> Recipe:
    raw = {
        "task": "ask",
        "data": {"file": "x"},
        "fields": {"text": "text", "label": {"column": "label", "values": {"True": "yes", "False": "no"}}},
        "prompt": {"template": "Is it? {text}"},
        "target": "{label}",
    }
    return parse_recipe(raw | changes, where="test")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": "a", ', ":2: malformed JSON, Expecting property name enclosed in double quotes at column"),
        (r'{"prompt": "a\ud83d", "completion": "b"}', ":2: half of a surrogate pair, '\\ud83d', which is no character"),
        pytest.param('{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}", ":2: nested too deeply", id="deep"),
        pytest.param('{"prompt": ' + "9" * 5000 + "}", ":2: a number with too many digits", id="digits"),
        ("[1]", ":2: a row must be a JSON object, found a list"),
        ({"prompt": "a"}, ":2: column 'completion' is missing; the row has: prompt"),
        ({"prompt": "a", "completions": "b"}, ":2: column 'completion' is missing; the row has: prompt, completions"),
        ({"prompt": "a", "completion": " "}, ":2: the completion is empty"),
        ({"prompt": "a", "completion": None}, ":2: 'completion' must be text, found null"),
        ({"prompt": "a", "completion": 3}, ":2: 'completion' must be text, found a number"),
        ({"prompt": " ", "completion": "b"}, ":2: 'prompt' is empty"),
        ({"instruction": "a"}, ":2: column 'output' is missing; the row has: instruction"),
        ({"text": "a"}, ":2: unknown row format with keys text; allowed: {prompt, completion}, {messages}"),
        ({"messages": "hi"}, ":2: 'messages' must be a list of at least a question and an answer"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}, "found role 'user'"),
        ({"messages": [{"role": "bot", "content": "a"}, {"role": "assistant", "content": "b"}]}, "role 'bot' in"),
        ({"messages": [{"role": "user"}, {"role": "assistant", "content": "b"}]}, "must have 'role' and 'content'"),
        (
            {"conversations": [{"from": "human", "value": ""}, {"from": "gpt", "value": "b"}]},
            "a turn of 'conversations' with role 'human' is empty",
        ),
        (
            {"messages": [{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}]},
            "must be [system,] user, assistant, user, ...; found assistant",
        ),
        (
            {"prompt": [{"role": "system", "content": "a"}], "completion": "b"},
            "roles in 'prompt' must be [system,] user, assistant, user, ...; found system",
        ),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_reason(tmp_path: Path, row: object, message: str) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}, row])
    with pytest.raises(DataError) as caught:
        read_examples(path, FREE)
    assert "1 of 2 rows are wrong:" in str(caught.value)
    assert f"{path}:2: " in str(caught.value)
    assert message in str(caught.value)
    assert "nothing was trained" in str(caught.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "column 'label' is missing; the row has: text"),
        ({"texts": "a", "label": True}, "column 'text' is missing; the row has: texts, label"),
        ({"text": "", "label": True}, "column 'text', used as 'text', is empty"),
        ({"text": ["a"], "label": True}, "column 'text' must be text or a number, found a list"),
        ({"text": None, "label": True}, "column 'text' must be text or a number, found null"),
        ({"text": "a", "label": "maybe"}, "column 'label' has the value 'maybe'; the recipe allows: False, True"),
    ],
)
def test_a_row_that_does_not_fit_the_recipe_is_named(tmp_path: Path, row: object, message: str) -> None:
    with pytest.raises(DataError) as caught:
        read_examples(write_jsonl(tmp_path / "rows.jsonl", [row]), field_recipe())
    assert f"rows.jsonl:1: {message}" in str(caught.value)


def test_ten_faults_are_shown_and_all_are_counted(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", ["{"] * 25 + [{"prompt": "a", "completion": "b"}])
    with pytest.raises(DataError) as caught:
        read_examples(path, FREE)
    assert "25 of 26 rows are wrong" in str(caught.value)
    assert str(caught.value).count("malformed") == 10
    assert "... and 15 more" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no rows. Write one JSON object per line"),
        (b"\n \n", "holds no rows"),
        (b"\xff\xfe\x00", "not UTF-8"),
    ],
)
def test_an_unreadable_or_empty_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_examples(path, FREE)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"There is no data file '.*nowhere.jsonl'. Give the path"):
        read_examples(tmp_path / "nowhere.jsonl", FREE)
    with pytest.raises(DataError, match="is a folder"):
        read_examples(tmp_path, FREE)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file/rows.jsonl cannot be read: Not a directory\. Check the path"):
        read_examples(tmp_path / "file" / "rows.jsonl", FREE)


@pytest.mark.parametrize(
    ("row", "roles", "last"),
    [
        ({"prompt": "q", "completion": "a"}, ["user"], "q"),
        ({"prompt": [{"role": "user", "content": "q"}], "completion": "a"}, ["user"], "q"),
        ({"instruction": "do", "input": "this", "output": "a"}, ["user"], "do\n\nthis"),
        ({"instruction": "do", "input": "", "output": "a"}, ["user"], "do"),
        (
            {
                "conversations": [
                    {"from": "system", "value": "s"},
                    {"from": "human", "value": "q"},
                    {"from": "gpt", "value": "a"},
                ]
            },
            ["system", "user"],
            "q",
        ),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, ["user"], "q"),
    ],
)
def test_every_format_gives_messages_and_an_answer(tmp_path: Path, row: object, roles: list[str], last: str) -> None:
    (example,) = read_examples(write_jsonl(tmp_path / "rows.jsonl", [row]), FREE).examples
    assert [message["role"] for message in example.messages] == roles
    assert example.messages[-1]["content"] == last
    assert example.target == "a"


def test_patterns_leave_rows_out_and_cut_values(tmp_path: Path) -> None:
    recipe = field_recipe(fields={"text": "text", "label": {"column": "label", "pattern": r"^(\d+) apples$"}})
    rows = [{"text": "a", "label": "9 apples"}, {"text": "b", "label": "9:3"}]
    parsed = read_examples(write_jsonl(tmp_path / "rows.jsonl", rows), recipe)
    assert [example.target for example in parsed.examples] == ["9"]
    assert (parsed.num_rows, parsed.num_left_out) == (2, 1)
    with pytest.raises(DataError, match=r"The patterns of the recipe leave none of the 1 rows"):
        read_examples(write_jsonl(tmp_path / "rows.jsonl", rows[1:]), recipe)


def row(prompt: str, target: str = "t", group: str | None = None) -> TokenRow:
    return TokenRow(0, ({"role": "user", "content": prompt},), target, group, (1,), (2,), f"{prompt}: {target}")


def test_equal_prompts_and_equal_groups_never_cross_the_split() -> None:
    rows = [row(f"{'  ' * (idx % 3)}Prompt {idx // 3}", f"t{idx}", group=f"g{idx // 6}") for idx in range(300)]
    for seed in range(5):
        train, held_out = split_rows(rows, Split(seed=seed, eval=60))
        assert len(held_out) == 60
        assert len(train) == 240
        assert not {normalise(r.prompt_text) for r in train} & {normalise(r.prompt_text) for r in held_out}
        assert not {r.group for r in train} & {r.group for r in held_out}


def test_the_split_depends_on_the_seed_but_not_on_the_order_of_the_file() -> None:
    rows = [row(f"p{idx}") for idx in range(50)]
    split = Split(seed=1, eval=10, train=20)
    assert split_rows(rows, split) == split_rows(rows[::-1], split)
    assert split_rows(rows, split)[1] != split_rows(rows, Split(seed=2, eval=10, train=20))[1]
    assert [len(side) for side in split_rows(rows, split)] == [20, 10]


def test_another_prompt_moves_no_row_to_the_other_side(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"text": f"row {idx}", "label": idx % 2 == 0, "note": idx} for idx in range(60)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)

    def held_out(**prompt: Any) -> list[int]:
        recipe = field_recipe(prompt={"template": "{text}"} | prompt, split={"eval": 20})
        return [row.line for row in prepare(path, recipe, tokenizer).held_out]

    lines = held_out()
    assert held_out(system="Be brief.") == lines
    assert held_out(template="Is it {text}?") == lines
    assert held_out(truncate={"text": 100}) == lines
    write_jsonl(path, [dict(reversed(row.items())) for row in rows])
    assert held_out() == lines


def test_duplicates_are_dropped_but_two_answers_to_one_prompt_are_not() -> None:
    assert deduplicate([row("A  b", "x"), row("a b", "X"), row("a b", "y")]) == [row("A  b", "x"), row("a b", "y")]


def test_too_few_rows_for_both_sides_are_refused() -> None:
    with pytest.raises(DataError, match=r"3 usable rows give 0 for training and 3 of 5 held out. Add rows"):
        split_rows([row(f"p{idx}") for idx in range(3)], Split(eval=5))
    with pytest.raises(DataError, match=r"check that `split\.group`"):
        split_rows([row(f"p{idx}", group="g") for idx in range(9)], Split(eval=5))


def test_only_the_answer_has_labels_and_the_last_is_the_stop_token(tokenizer: PreTrainedTokenizerBase) -> None:
    example = Example(1, {}, ({"role": "user", "content": "question"},), "answer", None)
    (encoded,) = encode([example], FREE, tokenizer)
    assert encoded is not None
    assert list(encoded.prompt_ids) == chat_token_ids(tokenizer, example.messages)
    assert encoded.labels[-1] == tokenizer.eos_token_id
    assert encoded.labels[: len(encoded.prompt_ids)] == [IGNORED] * len(encoded.prompt_ids)
    assert masked_sample(encoded, tokenizer) == (
        "<|im_start|>user\nquestion<|im_end|>\n<|im_start|>assistant\n",
        "answer<|im_end|>",
    )


def test_system_prompt_truncation_and_length_limits_apply(tokenizer: PreTrainedTokenizerBase) -> None:
    recipe = field_recipe(
        prompt={"template": "{text}", "system": "short", "truncate": {"text": 4}},
        filter={"max_tokens": {"text": 9}, "min_tokens": {"text": 2}},
    )
    texts = ["abcdefgh", "a", "abcdefghij"]
    rows = list(encode([Example(1, {"text": t, "label": "yes"}, (), "yes", None) for t in texts], recipe, tokenizer))
    assert [r.prompt_text if r else None for r in rows] == ["system: short\nuser: abcd", None, None]
    short = recipe.model_copy(update={"training": recipe.training.model_copy(update={"max_length": 10})})
    assert list(encode([Example(1, {"text": "abc", "label": "yes"}, (), "yes", None)], short, tokenizer)) == [None]


def test_the_report_counts_every_row_and_shows_the_mask(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write_task(tmp_path / "rows.jsonl", num_rows=30)
    with path.open("a") as file:
        file.write('{"prompt": "row 0", "completion": "ok ok"}\n{"prompt": "%s", "completion": "long"}\n' % ("x" * 600))
    data = prepare(path, tiny_recipe(split__eval=10), tokenizer)
    report = data.report
    assert (report.num_rows, report.num_duplicates, report.num_left_out_by_length) == (32, 1, 1)
    assert (report.num_train, report.num_held_out) == (len(data.train), len(data.held_out)) == (20, 10)
    assert report.sample_answer == "ok ok<|im_end|>"
    assert 0 < report.loss_share < 0.5
    assert rows_digest(data.train) != rows_digest(data.held_out)


def test_rows_that_are_all_too_long_stop_the_run(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write_task(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match=r"None of the 40 rows of .* passes the filter and the limit of 8 tokens"):
        prepare(path, tiny_recipe(training__max_length=8), tokenizer)


def test_batches_use_each_row_once_per_round_and_pad_little() -> None:
    lengths = [10 + (37 * idx) % 90 for idx in range(64)]
    plan = plan_batches(lengths, batch_size=8, num_steps=16, seed=0)
    assert [len(batch) for batch in plan] == [8] * 16
    assert sorted(idx for batch in plan[:8] for idx in batch) == list(range(64))
    padded = sum(8 * max(lengths[idx] for idx in batch) for batch in plan)
    assert padded < 1.15 * 2 * sum(lengths)
    assert plan == plan_batches(lengths, batch_size=8, num_steps=16, seed=0)
    assert plan != plan_batches(lengths, batch_size=8, num_steps=16, seed=1)


def test_padding_follows_lengths_so_a_stop_token_equal_to_the_pad_token_is_learnt() -> None:
    batch = collate(
        [{"input_ids": [5, 0], "labels": [IGNORED, 0]}, {"input_ids": [5, 6, 0], "labels": [IGNORED, 6, 0]}],
        pad_token_id=0,
    )
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [[IGNORED, 0, IGNORED], [IGNORED, 6, 0]]
