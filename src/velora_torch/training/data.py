"""From a recipe and a tokenizer to the data sets that the trainer gets.

Instruction data and plain text come out tokenised, with labels. Conversations stay messages,
since TRL's `SFTTrainer` applies the chat template to them.
"""

from __future__ import annotations

import difflib
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from velora_torch.training.assets import check_hub_model, check_model, normal_form
from velora_torch.training.packing import IGNORED, Tokens, pack_text, pack_whole
from velora_torch.training.recipe import Recipe, RecipeError
from velora_torch.training.rows import (
    Format,
    columns_of,
    conversations_of,
    examples_of,
    format_of,
    texts_of,
)
from velora_torch.training.schema import DataSection
from velora_torch.training.sources import (
    DataError,
    Rows,
    check_source,
    kind_of,
    read_packaged,
    read_rows,
)
from velora_torch.training.templates import PromptAnswer, Template, TemplateError

__all__ = ["DataError", "PreparedData", "check_context", "check_sources", "prepare"]

MOST_CHOICES = 50  # with metric "auto", more distinct answers than this are not a classification


@dataclass
class PreparedData:
    """What a run trains and evaluates on."""

    format: Format
    train: Any
    """A `datasets.Dataset`: input_ids and labels (position_ids too when packed), or for chat
    data either prompt and completion, or messages."""
    eval: Any | None
    """The held-out examples in the same form, if there are any."""
    collator: Callable[[list[dict[str, Any]]], dict[str, Any]] | None
    """Makes a batch; None for chat data, whose trainer brings its own."""
    eval_examples: list[PromptAnswer] = field(default_factory=list)
    """The held-out instruction examples one by one, never packed."""
    choices: dict[str, list[int]] | None = None
    """All answers with their tokens, when they form a small closed set to choose from."""
    assistant_only_loss: bool = False
    """For `SFTConfig`: conversations of several turns, of which only the answers are learnt."""
    stats: dict[str, Any] = field(default_factory=dict)
    """Counts of examples and tokens, for the report."""


def check_sources(recipe: Recipe) -> None:
    """Check in seconds what would else fail after the model is loaded: names, files, packages."""
    for name in (recipe.data.train, recipe.data.eval):
        if name is not None:
            check_source(name)
    check_model(recipe.model)
    check_hub_model(recipe.model)

    from transformers.training_args import OptimizerNames

    names = [name.value for name in OptimizerNames]
    if recipe.train.optimizer not in names:
        near = difflib.get_close_matches(recipe.train.optimizer, names, 1, 0.4)
        hint = f"; did you mean {near[0]!r}?" if near else f": {', '.join(names)}"
        raise RecipeError(
            f"`train.optimizer` is {recipe.train.optimizer!r}, which is none of transformers' "
            f"optimizer names{hint}"
        )


def check_context(recipe: Recipe, context: int | None) -> None:
    """Refuse sequences longer than the model's context (its `max_position_embeddings`)."""
    if context is not None and recipe.data.max_length > context:
        raise DataError(
            f"data.max_length is {recipe.data.max_length}, but the model's context is "
            f"{context} tokens; set data.max_length={context} or less"
        )


def prepare(recipe: Recipe, tokenizer: Any) -> PreparedData:
    """Load, split, limit and tokenise a recipe's data.

    A tokenizer without a padding token gets its end-of-sequence token as one.
    """
    data = recipe.data
    limit = tokenizer.model_max_length
    check_context(recipe, limit if limit < 10**9 else None)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    train, held_out = _load(data)
    columns = columns_of(train, data.columns, data.train)
    kind = format_of(data, columns, train, data.train)
    if held_out:
        source = data.eval or data.train
        held_columns = columns_of(held_out, data.columns, source)
        format_of(data.model_copy(update={"format": kind}), held_columns, held_out, source)
    else:
        held_out, held_columns = _split(train, columns, data), columns
    train = _some(train, data.max_train, data.seed)
    held_out = _some(held_out, data.max_eval, data.seed)

    builders = {"instruction": _instructions, "chat": _chats, "text": _texts}
    prepared = builders[kind](recipe, tokenizer, (train, columns), (held_out, held_columns))
    prepared.stats = {"format": kind, "source": data.train, **prepared.stats}
    return prepared


Part = tuple[Rows, dict[str, str]]


def _load(data: DataSection) -> tuple[Rows, Rows]:
    """Read training rows, and held-out rows where the data bring some."""
    packaged = kind_of(data.train) == "packaged"
    if packaged:
        train, held_out = read_packaged(data.train)
    else:
        train, held_out = read_rows(data.train, data.train_split, data.subset), []
    if data.eval is not None:
        if kind_of(data.eval) == "packaged":
            held_out = read_packaged(data.eval)[1]
        else:
            held_out = read_rows(data.eval, data.eval_split or data.train_split, data.subset)
    elif data.eval_split is not None and not packaged:
        held_out = read_rows(data.train, data.eval_split, data.subset)
    return train, held_out


def _split(train: Rows, columns: dict[str, str], data: DataSection) -> Rows:
    """Take a share of the rows out of `train`; rows with equal prompts stay on one side."""
    wanted = round(data.eval_fraction * len(train))
    if data.eval_fraction and len(train) > 1:
        wanted = max(wanted, 1)
    names = [columns[n] for n in ("instruction", "input") if n in columns] or list(columns.values())
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(train):
        key = "\n".join(normal_form(str(row.get(name, ""))) for name in names)
        groups.setdefault(key, []).append(index)
    keys = list(groups)
    random.Random(data.seed).shuffle(keys)
    held: set[int] = set()
    for key in keys:
        if len(held) >= wanted:
            break
        if len(held) + len(groups[key]) < len(train):
            held.update(groups[key])
    out = [train[i] for i in sorted(held)]
    train[:] = [row for i, row in enumerate(train) if i not in held]
    return out


def _some(rows: Rows, limit: int | None, seed: int) -> Rows:
    if limit is None or limit >= len(rows):
        return rows
    chosen = sorted(random.Random(seed).sample(range(len(rows)), limit))
    return [rows[i] for i in chosen]


def _fit(lengths: list[int], recipe: Recipe, source: str) -> list[int]:
    """Return which examples to keep under the recipe's policy on long ones."""
    data = recipe.data
    long = [i for i, n in enumerate(lengths) if n > data.max_length]
    if long and data.too_long == "error":
        raise DataError(
            f"{source}: example {long[0]} has {lengths[long[0]]} tokens, more than "
            f"data.max_length = {data.max_length} ({len(long)} such of {len(lengths)}, the longest "
            f"{max(lengths)}); raise data.max_length, or set data.too_long to truncate or skip"
        )
    if data.too_long == "skip":
        kept = [i for i, n in enumerate(lengths) if n <= data.max_length]
        if lengths and not kept:
            raise DataError(
                f"{source}: every example is longer than data.max_length = {data.max_length}"
            )
        return kept
    return list(range(len(lengths)))


def _shorten(example: PromptAnswer, length: int) -> PromptAnswer:
    """Cut to `length`: first the middle of the prompt, down to a quarter; then the answer's end."""
    prompt, answer = example.prompt_ids, example.answer_ids
    if len(prompt) + len(answer) <= length:
        return example
    room = max(length - len(answer), min(len(prompt), length // 4))
    if room < len(prompt):
        head = room // 2
        prompt = prompt[:head] + prompt[len(prompt) - (room - head) :]
    return PromptAnswer(example.prompt, example.answer, prompt, answer[: length - room])


def _labelled(example: PromptAnswer, answers_only: bool) -> Tokens:
    ids = example.prompt_ids + example.answer_ids
    prompt = [IGNORED] * len(example.prompt_ids) if answers_only else example.prompt_ids
    return Tokens(ids, prompt + example.answer_ids)


def _instructions(recipe: Recipe, tokenizer: Any, train: Part, held_out: Part) -> PreparedData:
    data = recipe.data
    try:
        template = Template(data.template, tokenizer, data.system)
    except TemplateError as error:
        raise DataError(str(error)) from None

    def encode(part: Part, source: str) -> tuple[list[PromptAnswer], int]:
        encoded = template.encode(examples_of(*part, source))
        lengths = [len(e.prompt_ids) + len(e.answer_ids) for e in encoded]
        kept = [_shorten(encoded[i], data.max_length) for i in _fit(lengths, recipe, source)]
        return kept, len(encoded) - len(kept)

    learnt, skipped = encode(train, data.train)
    held, _ = encode(held_out, data.eval or data.train)
    answers = sorted({e.answer for e in learnt} | {e.answer for e in held})
    choices = None
    if held and _is_choice(recipe, answers, len(learnt)):
        choices = dict(zip(answers, template.encode_answers(answers), strict=True))
    prepared = _tokenised(
        recipe,
        tokenizer,
        [_labelled(e, data.answers_only) for e in learnt],
        [_labelled(e, data.answers_only) for e in held],
        pack_whole,
    )
    prepared.format, prepared.eval_examples, prepared.choices = "instruction", held, choices
    prepared.stats.update(skipped=skipped, choices=len(answers) if choices else None)
    return prepared


def _is_choice(recipe: Recipe, answers: list[str], examples: int) -> bool:
    if recipe.evaluate.metric == "auto":
        return 1 < len(answers) <= MOST_CHOICES and examples >= 4 * len(answers)
    return recipe.evaluate.metric == "choice"


def _texts(recipe: Recipe, tokenizer: Any, train: Part, held_out: Part) -> PreparedData:
    data, eos = recipe.data, tokenizer.eos_token_id

    def encode(part: Part, source: str) -> tuple[list[Tokens], int]:
        texts = texts_of(*part, source)
        encoded = tokenizer(texts)["input_ids"] if texts else []
        if eos is not None:
            encoded = [ids if ids and ids[-1] == eos else [*ids, eos] for ids in encoded]
        if data.packing:  # a long text goes on in the next row
            return [Tokens(ids, ids) for ids in encoded], 0
        keep = _fit([len(ids) for ids in encoded], recipe, source)
        short = [encoded[i][: data.max_length] for i in keep]
        return [Tokens(ids, ids) for ids in short], len(encoded) - len(short)

    if recipe.evaluate.metric == "choice":
        raise DataError("evaluate.metric 'choice' needs instruction data; these are plain text")
    learnt, skipped = encode(train, data.train)
    held, _ = encode(held_out, data.eval or data.train)
    prepared = _tokenised(recipe, tokenizer, learnt, held, pack_text)
    prepared.format = "text"
    prepared.stats["skipped"] = skipped
    return prepared


def _tokenised(
    recipe: Recipe, tokenizer: Any, train: list[Tokens], held: list[Tokens], pack: Any
) -> PreparedData:
    from datasets import Dataset
    from transformers import DataCollatorForSeq2Seq, default_data_collator

    length = recipe.data.max_length
    collator: Any = default_data_collator  # packed rows have one length
    fill: Any = _unpacked
    if recipe.data.packing:
        fill = partial(pack, length=length, pad_id=tokenizer.pad_token_id)
    else:
        collator = DataCollatorForSeq2Seq(tokenizer, padding=True, pad_to_multiple_of=8)
    lengths = [len(s) for s in train]
    train_set = Dataset.from_list(list(fill(train)))
    stats = {
        "train_examples": len(train),
        "eval_examples": len(held),
        "train_rows": len(train_set),
        "train_tokens": sum(lengths),
        "learnt_tokens": sum(n != IGNORED for s in train for n in s.labels[1:]),
        "longest": max(lengths),
        "mean_length": sum(lengths) / len(lengths),
    }
    eval_set = Dataset.from_list(list(fill(held))) if held else None
    return PreparedData("text", train_set, eval_set, collator, stats=stats)


def _unpacked(sequences: Iterable[Tokens]) -> Iterable[dict[str, list[int]]]:
    return ({"input_ids": s.input_ids, "labels": s.labels} for s in sequences)


def _chats(recipe: Recipe, tokenizer: Any, train: Part, held_out: Part) -> PreparedData:
    from datasets import Dataset

    data = recipe.data
    if not tokenizer.chat_template:
        raise DataError(
            "the data are conversations, but the model's tokenizer has no chat template; "
            "choose a model made for chat"
        )
    if recipe.evaluate.metric == "choice":
        raise DataError("evaluate.metric 'choice' needs instruction data; these are conversations")

    def read(part: Part, source: str) -> tuple[list[list[dict[str, str]]], list[int]]:
        chats = conversations_of(*part, source, data.system)
        lengths = [_chat_length(tokenizer, messages) for messages in chats]
        keep = _fit(lengths, recipe, source)
        return [chats[i] for i in keep], [lengths[i] for i in keep]

    learnt, lengths = read(train, data.train)
    held, _ = read(held_out, data.eval or data.train)
    # One answer at the end is a prompt with a completion, which every chat template allows.
    single = data.answers_only and all(
        [m["role"] for m in chat].index("assistant") == len(chat) - 1 for chat in learnt + held
    )

    def dataset(chats: list[list[dict[str, str]]]) -> Any:
        if single:
            return Dataset.from_list([{"prompt": c[:-1], "completion": c[-1:]} for c in chats])
        return Dataset.from_list([{"messages": c} for c in chats])

    stats = {
        "train_examples": len(learnt),
        "eval_examples": len(held),
        "train_tokens": sum(lengths),
        "longest": max(lengths),
        "mean_length": sum(lengths) / len(lengths),
        "skipped": len(train[0]) - len(learnt),
    }
    return PreparedData(
        "chat",
        dataset(learnt),
        dataset(held) if held else None,
        collator=None,
        assistant_only_loss=data.answers_only and not single,
        stats=stats,
    )


def _chat_length(tokenizer: Any, messages: list[dict[str, str]]) -> int:
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])
