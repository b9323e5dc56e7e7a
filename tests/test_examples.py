"""Rows of every accepted form become the same prompt and answer tokens; everything else is refused by its row."""

import json
import re
from collections import UserDict
from collections.abc import Iterator
from itertools import chain, repeat
from typing import Any

import pytest
import torch
from tiny import word_tokenizer

from peft_nlsr.errors import CalibrationError, PeftNLSRError
from peft_nlsr.examples import (
    Example,
    batches_of,
    collate,
    collated,
    cut_by_length,
    loader_rows,
    read_examples,
    token_weights,
)

CHAT, PLAIN, BOTH_ENDS = word_tokenizer(), word_tokenizer(chat=False), word_tokenizer(chat=False, begin=True, end=True)
USER, ASSISTANT = {"role": "user", "content": "paint the vase"}, {"role": "assistant", "content": "sure word1"}


def ids(text: str) -> tuple[int, ...]:
    return tuple(CHAT(text, add_special_tokens=False)["input_ids"])


PROMPT, ANSWER = ids("<user> paint the vase <bot>"), ids("sure word1 </s>")


def read(*rows: Any, tokenizer: Any = CHAT, limit: int = 99, max_length: int = 99, **more: Any) -> list[Example]:
    found = read_examples(rows, tokenizer, limit=limit, max_length=max_length, **more)
    return sorted(found, key=lambda example: example.index)


FORMS: dict[str, Any] = {
    "prompt-response": {"prompt": "paint the vase", "response": "sure word1"},
    "prompt-completion": {"prompt": "paint the vase", "completion": "sure word1"},
    "prompt-chosen": {"prompt": "paint the vase", "chosen": "sure word1", "rejected": "no"},
    "prompt-and-completion-as-messages": {"prompt": [USER], "completion": [ASSISTANT]},
    "messages": {"messages": [USER, ASSISTANT]},
    "other-keys-do-not-matter": {"id": 3, "prompt": "paint the vase", "response": "sure word1"},
    "mapping-that-is-no-dict": UserDict({"messages": [USER, ASSISTANT]}),
    "tokenised": {"input_ids": [*PROMPT, *ANSWER], "labels": [-100] * len(PROMPT) + list(ANSWER)},
    "tokenised-tensors": {
        "input_ids": torch.tensor([*PROMPT, *ANSWER]),
        "labels": torch.tensor([-100] * len(PROMPT) + list(ANSWER)),
        "attention_mask": torch.ones(len(PROMPT + ANSWER)),
    },
    "tokenised-all-labels-count": {"input_ids": [*PROMPT, *ANSWER], "labels": [*PROMPT, *ANSWER]},
    "tokenised-with-completion-mask": {
        "input_ids": [*PROMPT, *ANSWER],
        "completion_mask": [0] * len(PROMPT) + [1] * len(ANSWER),
    },
    "tokenised-with-assistant-masks": {
        "input_ids": [*PROMPT, *ANSWER],
        "assistant_masks": [0] * len(PROMPT) + [1] * len(ANSWER),
    },
    "prompt-ids-and-completion-ids": {"prompt_ids": list(PROMPT), "completion_ids": list(ANSWER)},
    "prompt-ids-and-chosen-ids": {"prompt_ids": list(PROMPT), "chosen_ids": list(ANSWER), "rejected_ids": [9]},
    "text-of-a-chat": {"text": "<user> paint the vase <bot> sure word1 </s>"},
    "gaps-of-joined-data": {"text": None, "prompt": "paint the vase", "response": None, "completion": "sure word1"},
    "example": Example(PROMPT, ANSWER),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_prompt_and_answer(form: str) -> None:
    assert read(FORMS[form]) == [Example(PROMPT, ANSWER, 0)]


@pytest.mark.parametrize("refusal", [True, False, None])
def test_what_is_known_of_an_example_stays_with_it(refusal: bool | None) -> None:
    assert read(Example(PROMPT, ANSWER, 7, refusal)) == [Example(PROMPT, ANSWER, 7, refusal)]


SECOND = (ids("<user> word3 <bot>"), ids("no </s>"))


@pytest.mark.parametrize("labelled", ["answers", "everything"])
def test_a_packed_row_is_cut_into_its_documents(labelled: str) -> None:
    documents = [(PROMPT, ANSWER), SECOND]
    tokens = [t for prompt, answer in documents for t in (*prompt, *answer)]
    positions = [i for prompt, answer in documents for i in range(len(prompt + answer))]
    labels = [
        -100 if i == 0 or (labelled == "answers" and i < len(prompt)) else t
        for prompt, answer in documents
        for i, t in enumerate((*prompt, *answer))
    ]
    row = {"input_ids": [tokens], "labels": [labels], "position_ids": torch.tensor([positions])}
    assert read(row) == [Example(PROMPT, ANSWER, 0), Example(*SECOND, 0)]


def test_the_last_answer_of_a_chat_is_the_one_that_counts() -> None:
    chat = (*PROMPT, *ANSWER, *SECOND[0], *SECOND[1])
    assert read({"input_ids": list(chat)}) == [Example((*PROMPT, *ANSWER, *SECOND[0]), SECOND[1], 0)]


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        pytest.param({"prompt": "paint the vase"}, PROMPT, (), id="prompt-only"),
        pytest.param({"prompt": "paint the vase", "response": None}, PROMPT, (), id="response-is-none"),
        pytest.param({"messages": [USER]}, PROMPT, (), id="messages-without-answer"),
        pytest.param({"text": "paint the vase"}, (), ids("paint the vase"), id="text"),
        pytest.param({"input_ids": [7, 6]}, (), (7, 6), id="tokens-without-labels"),
        pytest.param({"input_ids": [7, 6], "labels": [7, 6]}, (), (7, 6), id="all-labels-count"),
        pytest.param({"input_ids": [5, 6], "labels": [-100, -100]}, (5, 6), (), id="no-label-counts"),
        pytest.param({"input_ids": [7, 6, 0], "attention_mask": [1, 1, 0]}, (), (7, 6), id="padding-is-dropped"),
    ],
)
def test_what_is_missing_stays_empty(row: Any, prompt: tuple[int, ...], answer: tuple[int, ...]) -> None:
    assert read(row) == [Example(prompt, answer, 0)]


def test_only_the_last_assistant_turn_is_the_answer() -> None:
    conversation = [USER, ASSISTANT, {"role": "user", "content": "how"}, {"role": "assistant", "content": "never"}]
    (found,) = read({"messages": conversation})
    assert found.answer == ids("never </s>")
    assert found.prompt == ids("<user> paint the vase <bot> sure word1 </s> <user> how <bot>")


@pytest.mark.parametrize("messages", [[USER, ASSISTANT], [USER, ASSISTANT, USER, ASSISTANT]], ids=["one", "two"])
def test_prompt_and_answer_together_are_the_whole_conversation(messages: list[dict[str, str]]) -> None:
    (found,) = read({"messages": messages})
    assert found.tokens == ids(CHAT.apply_chat_template(messages, tokenize=False))


def letters_that_merge() -> Any:
    """A tokenizer that marks the start of every text with "_", as Llama's does; the answer is no start."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<unk>", "_", *"QAxyz: "])}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(replacement="_", prepend_scheme="first", split=False),
            pre_tokenizers.Split("", "isolated"),
        ]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ ('A:' if m['role'] == 'assistant' else 'Q:') + m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'A:' }}{% endif %}"
    )
    return tokenizer


def test_an_answer_is_tokenised_as_the_continuation_of_its_prompt() -> None:
    tokenizer = letters_that_merge()
    alone = tokenizer("x", add_special_tokens=False)["input_ids"]
    whole = tokenizer("Q:yA:x", add_special_tokens=False)["input_ids"]
    assert len(alone) == 2 and whole[-2:] != alone, "the tokenizer should mark the start of a text"
    (found,) = read({"prompt": "y", "response": "x"}, tokenizer=tokenizer)
    assert list(found.tokens) == whole and found.answer == (whole[-1],)


@pytest.mark.parametrize("tokenizer", [PLAIN, BOTH_ENDS], ids=["no-special-tokens", "begin-and-end-by-default"])
def test_without_a_template_the_prompt_begins_the_text_and_the_answer_ends_it(tokenizer: Any) -> None:
    begin = (1,) if tokenizer is BOTH_ENDS else ()
    (answered,) = read({"prompt": "paint the vase", "response": "sure"}, tokenizer=tokenizer)
    assert answered == Example((*begin, *ids("paint the vase")), (*ids("sure"), 2), 0)
    (asked,) = read({"prompt": "paint the vase"}, tokenizer=tokenizer)
    assert asked == Example((*begin, *ids("paint the vase")), (), 0)
    (text,) = read({"text": "paint the vase"}, tokenizer=tokenizer)
    assert text.tokens == tuple(tokenizer("paint the vase")["input_ids"])


def test_a_template_brings_its_own_begin_and_end() -> None:
    tokenizer = word_tokenizer(begin=True, end=True)
    (found,) = read({"prompt": "paint the vase", "response": "sure word1"}, tokenizer=tokenizer)
    assert found == Example(PROMPT, ANSWER, 0)


@pytest.mark.parametrize("as_text", [False, True])
def test_the_template_sees_the_tools_and_options_of_a_row(as_text: bool) -> None:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{{ tools[0]['name'] }} {{ style }} " + tokenizer.chat_template
    tools: Any = [{"name": "lamp"}]
    row = {"messages": [USER, ASSISTANT], "tools": json.dumps(tools) if as_text else tools}
    (found,) = read(row | {"chat_template_kwargs": {"style": "sure"}}, tokenizer=tokenizer)
    assert found == Example((*ids("lamp sure"), *PROMPT), ANSWER, 0)


@pytest.mark.parametrize("empty", [[], {}, "", "[]", "null", None])
def test_empty_tools_are_none(empty: Any) -> None:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% if tools is not none %}lamp {% endif %}" + tokenizer.chat_template
    row = {"messages": [USER, ASSISTANT], "tools": empty, "chat_template_kwargs": {}}
    assert read(row, tokenizer=tokenizer) == [Example(PROMPT, ANSWER, 0)]


@pytest.mark.parametrize("tools", [[{"name": "lamp"}], "search, calculator"])
@pytest.mark.parametrize("unread", ["no-template", "prompt-is-text"])
def test_tools_that_nothing_would_read_are_ignored(unread: str, tools: Any) -> None:
    tokenizer, row = (PLAIN, {"messages": [USER]}) if unread == "no-template" else (CHAT, {"prompt": USER["content"]})
    assert read(row | {"tools": tools, "chat_template_kwargs": "{}"}, tokenizer=tokenizer) == read(
        row, tokenizer=tokenizer
    )


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("tools", "search, calculator", "column 'tools' is no JSON .*give a list of tool schemas, or leave"),
        ("tools", 3, "column 'tools' is a int; give a list of tool schemas"),
        ("chat_template_kwargs", "{}", "column 'chat_template_kwargs' is a str; give a mapping"),
    ],
)
def test_what_the_template_cannot_be_given_is_named_by_its_column(column: str, value: Any, words: str) -> None:
    with pytest.raises(CalibrationError, match=f"row 0 cannot be read .*{words}"):
        read({"messages": [USER], column: value})


def test_a_tokenizer_without_an_end_adds_none() -> None:
    tokenizer = word_tokenizer(chat=False)
    tokenizer.eos_token = None
    (found,) = read({"prompt": "paint", "response": "sure"}, tokenizer=tokenizer)
    assert found.answer == ids("sure")


# ---- collated batches


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("as_lists", [False, True], ids=["tensors", "lists"])
def test_a_padded_batch_is_read_row_by_row(side: str, as_lists: bool) -> None:
    examples = [Example((4, 6, 5), (9, 2)), Example((4, 5), (8,)), Example((7, 7, 7, 7), ())]
    batch = collate(examples, pad_id=0)
    if side == "left":
        order = batch["attention_mask"].argsort(dim=1, stable=True)
        batch = {name: values.gather(1, order) for name, values in batch.items()}
    given: Any = {name: values.tolist() for name, values in batch.items()} if as_lists else batch
    assert read(given, tokenizer=None) == [Example(e.prompt, e.answer, 0) for e in examples]


def test_collating_is_undone_by_reading() -> None:
    examples = [Example((4,) * 65, (9, 2)), Example((), (8, 2)), Example((7,) * 80, ())]
    batches = collated(examples, 2, pad_id=0)
    assert [len(batch["input_ids"]) for batch in batches] == [2, 1]
    found = read_examples(iter(batches), None, limit=9, max_length=99)
    assert {(e.prompt, e.answer) for e in found} == {(e.prompt, e.answer) for e in examples}


def test_weights_count_every_token_once_and_the_decision_more() -> None:
    examples = [Example((4, 6, 5), (9, 2)), Example((), (8, 2))]
    expected = torch.tensor([[1.0, 1.0, 10.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(token_weights(examples, 10.0), expected, rtol=0, atol=0)


def test_batches_hold_every_example_once_longest_first() -> None:
    examples = [Example((1,) * n, ()) for n in (66, 69, 65, 68, 67)]
    batches = batches_of(examples, 2)
    assert [len(e.tokens) for batch in batches for e in batch] == [69, 68, 67, 66, 65]
    assert [len(batch) for batch in batches] == [2, 2, 1]


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_batch_of_short_examples_holds_more_of_them(size: int) -> None:
    lengths = sorted(range(100), reverse=True)
    batches = cut_by_length(lengths, lengths, size)
    assert [length for batch in batches for length in batch] == lengths
    for batch in batches[:-1]:
        padded = len(batch) * batch[0]
        assert len(batch) >= size
        assert padded <= 64 * size or len(batch) == size
        assert padded + batch[0] > 64 * size


# ---- limits and sampling


@pytest.mark.parametrize(
    ("max_length", "prompt", "answer"),
    [(99, 5, 3), (8, 5, 3), (7, 5, 2), (5, 5, 0)],
    ids=["long-enough", "exact", "answer-cut", "answer-gone"],
)
def test_long_examples_are_cut_on_the_right(max_length: int, prompt: int, answer: int) -> None:
    (found,) = read(FORMS["messages"], max_length=max_length)
    assert (found.prompt, found.answer) == (PROMPT[:prompt], ANSWER[:answer])


def test_a_prompt_that_is_cut_cannot_be_asked_and_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    short = {"prompt": "paint", "response": "sure"}
    found = read(FORMS["messages"], short, max_length=4)
    assert found[0] == Example((), PROMPT[:4], 0) and found[1].prompt == ids("<user> paint <bot>")
    assert "1 examples have prompts longer than max_length=4" in caplog.text and "not asked" in caplog.text


@pytest.mark.parametrize("form", ["prompt-completion", "prompt-ids-and-completion-ids"])
def test_completions_that_are_marked_as_undesirable_are_left_out(form: str, caplog: pytest.LogCaptureFixture) -> None:
    good, bad = FORMS[form] | {"label": True}, FORMS[form] | {"label": False}
    assert [e.index for e in read(bad, good, bad)] == [1]
    assert "2 completions with label=False" in caplog.text


@pytest.mark.parametrize("form", ["torch", "numpy"])
@pytest.mark.parametrize("tokens", [False, True], ids=["text", "ids"])
def test_undesirable_completions_of_formatted_data_are_left_out(form: str, tokens: bool) -> None:
    datasets = pytest.importorskip("datasets")
    row = FORMS["prompt-ids-and-completion-ids" if tokens else "prompt-completion"]
    data = datasets.Dataset.from_list([row | {"label": wanted} for wanted in (False, True, False)])
    assert read_examples(data.with_format(form), CHAT, limit=3, max_length=99) == [Example(PROMPT, ANSWER, 1)]


@pytest.mark.parametrize("as_lists", [False, True], ids=["tensors", "lists"])
def test_undesirable_completions_of_a_batch_are_left_out(as_lists: bool, caplog: pytest.LogCaptureFixture) -> None:
    examples = [Example((4, 5), (8,)), Example((4, 6, 5), (9, 2)), Example((4, 7), (9,))]
    batch = collate(examples, pad_id=0)
    batch["completion_mask"] = (batch.pop("labels") != -100).long()
    batch["label"] = torch.tensor([False, True, False])
    given: Any = {name: values.tolist() for name, values in batch.items()} if as_lists else batch
    assert read(given, tokenizer=None) == [Example(examples[1].prompt, examples[1].answer, 0)]
    given["label"] = [False] * 3
    assert len(read(given, {"input_ids": [7]}, tokenizer=None)) == 1
    assert "2 completions with label=False" in caplog.text and "3 completions with label=False" in caplog.text


def test_undesirable_completions_of_trls_collator_are_left_out() -> None:
    kto = pytest.importorskip("trl.trainer.kto_trainer")
    data = [{"prompt_ids": [4, 10 + i], "completion_ids": [20 + i], "label": i % 2 == 0} for i in range(6)]
    collator = kto.DataCollatorForUnpairedPreference(pad_token_id=0)
    loader = torch.utils.data.DataLoader(data, batch_size=3, collate_fn=collator)  # type: ignore[arg-type]
    for source in (loader, loader_rows(loader)):
        found = read_examples(source, CHAT, limit=9, max_length=99)
        assert sorted((e.prompt, e.answer) for e in found) == [((4, 10 + i), (20 + i,)) for i in (0, 2, 4)]


def test_labels_of_other_data_mean_nothing_here() -> None:
    assert len(read({"text": "paint", "label": False}, FORMS["prompt-completion"] | {"label": 0})) == 2


def many(count: int) -> list[dict[str, Any]]:
    return [{"input_ids": [i]} for i in range(count)]


def test_data_with_a_length_are_sampled_by_seed_without_repetition() -> None:
    one, same, other = (read_examples(many(50), None, limit=20, max_length=9, seed=s) for s in (3, 3, 4))
    assert one == same and {e.index for e in one} != {e.index for e in other}
    assert len({e.index for e in one}) == 20 and all(e.answer == (e.index,) for e in one)


def test_sampling_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    read_examples(many(50), None, limit=20, max_length=9)
    assert torch.equal(state, torch.get_rng_state())


def test_a_larger_limit_extends_the_sample() -> None:
    few, more = (read_examples(many(50), None, limit=n, max_length=9) for n in (5, 20))
    assert more[:5] == few


class MapStyle:
    """A torch dataset: length and items, no iterator."""

    def __len__(self) -> int:
        return 50

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < 50:
            raise IndexError(index)
        return {"input_ids": [index]}


def test_a_dataset_without_an_iterator_is_sampled_like_a_list() -> None:
    assert read_examples(MapStyle(), None, limit=7, max_length=9) == read_examples(
        many(50), None, limit=7, max_length=9
    )  # type: ignore[arg-type]


def test_a_stream_gives_its_first_rows_and_no_more_are_read() -> None:
    taken: list[int] = []

    def stream() -> Iterator[dict[str, Any]]:
        for i in range(1000):
            taken.append(i)
            yield {"input_ids": [i]}

    found = read_examples(stream(), None, limit=4, max_length=9)
    assert [e.index for e in found] == [0, 1, 2, 3] and len(taken) <= 5


def test_a_stream_is_read_until_it_has_given_enough_examples() -> None:
    bad = FORMS["prompt-completion"] | {"label": False}
    found = read_examples(iter([bad, {"input_ids": []}, FORMS["messages"], bad]), CHAT, limit=1, max_length=99)
    assert found == [Example(PROMPT, ANSWER, 2)]


def test_an_endless_stream_without_examples_is_given_up() -> None:
    with pytest.raises(CalibrationError, match=r"in the first \d+ rows, .*no more are read of data without a length"):
        read_examples(repeat({"text": ""}), CHAT, limit=1, max_length=9)


def test_an_endless_stream_that_has_too_few_examples_gives_these_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    stream = chain([{"input_ids": [7]}], repeat({"input_ids": []}))
    assert read_examples(stream, None, limit=2, max_length=9) == [Example((), (7,), 0)]
    assert re.search(r"1 examples in the first \d+ rows; no more are read", caplog.text)


class Streamed(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    """Has a length, and like all of its kind a ``__getitem__`` that only raises."""

    def __len__(self) -> int:
        return 50

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(many(50))


def test_an_iterable_dataset_with_a_length_is_read_in_order() -> None:
    loader = torch.utils.data.DataLoader(Streamed(), collate_fn=lambda rows: {"input_ids": rows[0]["input_ids"]})
    for data in (Streamed(), loader_rows(loader)):
        assert [e.index for e in read_examples(data, None, limit=3, max_length=9)] == [0, 1, 2]


def test_a_data_frame_is_refused_with_advice() -> None:
    pandas = pytest.importorskip("pandas")
    with pytest.raises(CalibrationError, match=r"a DataFrame has no row \d by position; .*to_dict\('records'\)"):
        read_examples(pandas.DataFrame([{"prompt": "how"}] * 3), CHAT, limit=3, max_length=9)


class Transformed(MapStyle):
    """Looks for a column that is not there, as a wrong transform of a dataset does."""

    def to_dict(self) -> None:
        raise AssertionError("is a dataset, no data frame")

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": {"prompt": "how"}["question"]}


def test_a_key_that_the_data_themselves_look_for_is_named() -> None:
    with pytest.raises(CalibrationError, match=r"row \d+ of the Transformed .* no key 'question'") as error:
        read_examples(Transformed(), CHAT, limit=3, max_length=9)
    assert "data frame" not in str(error.value)


def test_a_data_loader_gives_its_batches() -> None:
    loader = torch.utils.data.DataLoader(
        MapStyle(), batch_size=4, collate_fn=lambda rows: {"input_ids": torch.tensor([r["input_ids"] for r in rows])}
    )
    found = read_examples(loader, None, limit=6, max_length=9)
    assert [(e.answer, e.index) for e in found] == [((i,), i // 4) for i in range(6)]


def test_a_datasets_dataset_is_accepted() -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list([{"prompt": "paint the vase", "response": "sure word1"}])
    assert read_examples(data, CHAT, limit=3, max_length=99) == [Example(PROMPT, ANSWER, 0)]


def test_rows_without_tokens_are_passed_over() -> None:
    found = read({"input_ids": []}, {"input_ids": [7]}, {"text": ""}, {"input_ids": [1, 2], "attention_mask": [0, 0]})
    assert found == [Example((), (7,), 1)]


def test_the_data_are_not_changed() -> None:
    conversation = [{"role": "user", "content": "how"}, {"role": "assistant", "content": "never"}]
    row = {"messages": conversation}
    read(row)
    assert row == {"messages": [{"role": "user", "content": "how"}, {"role": "assistant", "content": "never"}]}
    assert row["messages"] is conversation


# ---- errors


@pytest.mark.parametrize(
    ("data", "words"),
    [
        pytest.param([], "no examples with tokens; give an iterable of", id="empty-list"),
        pytest.param(iter([]), "no examples with tokens", id="empty-stream"),
        pytest.param([{"text": ""}], "no examples with tokens", id="empty-texts"),
        pytest.param(
            [{"instruction": "x", "output": "y"}], r"row 0 has the keys \['instruction', 'output'\]", id="keys"
        ),
        pytest.param([{"text": None}], "row 0 has no values", id="nothing-but-gaps"),
        pytest.param(["paint"], "row 0 is a str, expected one of .*'prompt', 'response'", id="row-is-text"),
        pytest.param([{"text": "paint"}, 3], "row 1 is a int", id="row-is-a-number"),
        pytest.param({"prompt": "paint"}, "a single dict; give an iterable", id="one-row"),
        pytest.param("paint the vase", "a single str; give an iterable", id="one-text"),
        pytest.param(7, "a single int; give an iterable", id="one-number"),
    ],
)
def test_data_of_unknown_form_are_refused_with_the_accepted_forms(data: Any, words: str) -> None:
    with pytest.raises(CalibrationError, match=words) as error:
        read_examples(data, CHAT, limit=9, max_length=9)
    assert "'messages'" in str(error.value) and "'input_ids'" in str(error.value)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        pytest.param({"messages": []}, "empty conversation", id="no-messages"),
        pytest.param({"messages": [{"from": "human", "value": "x"}]}, "KeyError: 'role'", id="sharegpt-keys"),
        pytest.param({"prompt": 3, "response": "x"}, "TypeError", id="prompt-is-a-number"),
        pytest.param({"input_ids": [[1, 2], [3]]}, "ValueError", id="ragged-batch"),
        pytest.param({"input_ids": [1, 2], "labels": [1]}, "RuntimeError", id="labels-of-another-length"),
        pytest.param({"messages": [{"role": "tool", "content": "x"}]}, "template refuses it: no tools", id="template"),
    ],
)
def test_a_row_that_cannot_be_read_is_named(row: Any, words: str) -> None:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% if messages[0]['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}x"
    with pytest.raises(CalibrationError, match=rf"row 1 cannot be read \(.*{words}.*\); expected one of"):
        read_examples(iter([{"input_ids": [5]}, row]), tokenizer, limit=9, max_length=9)


def test_text_without_a_tokenizer_says_what_to_pass() -> None:
    with pytest.raises(PeftNLSRError, match=r"need a tokenizer: pass tokenizer=\.\.\."):
        read({"prompt": "paint"}, tokenizer=None)
