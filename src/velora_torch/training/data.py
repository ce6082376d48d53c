"""From a recipe and a tokenizer to the data sets that the trainer gets.

Instruction data and plain text come out tokenised, with labels. Conversations come out in a
form that TRL's `SFTTrainer` takes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from velora_torch.training.answer_spans import Messages, chat_length, has_one_answer, learn_answers
from velora_torch.training.assets import check_hub_model, check_model, normal_form
from velora_torch.training.own_optimizers import check_optimizer
from velora_torch.training.packing import IGNORED, Tokens, pack_text, pack_whole
from velora_torch.training.perplexity import check_general_text
from velora_torch.training.recipe import Recipe
from velora_torch.training.rows import (
    Format,
    Part,
    columns_of,
    conversations_of,
    examples_of,
    format_of,
    texts_of,
)
from velora_torch.training.sections import DataSection
from velora_torch.training.sources import (
    DataError,
    Rows,
    check_source,
    has_test_split,
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

    format: Format | Literal["labelled", "images", "tokens"]
    train: Any
    """A `datasets.Dataset`: input_ids and labels (position_ids too when packed). For chat data,
    what `SFTTrainer` takes: prompt and completion, input_ids and labels, or messages. Images are
    a `torch.utils.data.Dataset`: pixel_values (3, H, W) in uint8 and labels. For pre-training,
    `TokenWindows` in the order in which they are learnt from."""
    eval: Any | None
    """The held-out examples in the same form, if there are any."""
    collator: Callable[[list[dict[str, Any]]], dict[str, Any]] | None
    """Makes a batch; None for chat data, whose trainer brings its own."""
    eval_examples: list[PromptAnswer] = field(default_factory=list)
    """The held-out instruction examples one by one, never packed."""
    choices: dict[str, list[int]] | None = None
    """All answers with their tokens, when they form a small closed set to choose from."""
    classes: tuple[str, ...] | None = None
    """Names of the classes of a classification; a label is the place of its name in it."""
    assistant_only_loss: bool = False
    """For `SFTConfig`: only marks in the chat template can tell the answers from the rest."""
    configuration: Any = None
    """Of the model that starts from random weights (transformers' `PretrainedConfig`)."""
    stats: dict[str, Any] = field(default_factory=dict)
    """Counts of examples and tokens, for the report."""


def check_sources(recipe: Recipe) -> None:
    """Check in seconds what would else fail after the model is loaded: names, files, packages."""
    if recipe.task == "pretrain":
        from velora_torch.training.pretraining.prepare import check_pretraining

        check_pretraining(recipe)
    else:
        for name in (recipe.data.train, recipe.data.eval):
            if name is not None:
                _checker(recipe, name)(name)
        if recipe.evaluate.perplexity is not None:
            check_general_text(recipe.evaluate.perplexity)
        check_model(recipe.model)
        check_hub_model(recipe.model)
    check_optimizer(recipe.train)


def _checker(recipe: Recipe, name: str) -> Callable[[str], None]:
    """What checks a source of data without reading it."""
    if recipe.task == "language-modeling":
        return check_source
    if recipe.task == "image-classification":
        from velora_torch.training.pictures import check_pictures

        return check_pictures
    from velora_torch.training.labelled import check_labelled

    return check_labelled


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
    if recipe.task == "image-classification":
        from velora_torch.training.pictures import prepare_pictures

        return prepare_pictures(recipe)
    limit = tokenizer.model_max_length
    check_context(recipe, limit if limit < 10**9 else None)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if recipe.task != "language-modeling":
        from velora_torch.training.labelled import prepare_labelled

        return prepare_labelled(recipe, tokenizer)
    train_rows, held_rows = load_rows(data)
    train = _part(train_rows, data, data.train)
    kind = format_of(data, train.columns, train.rows, data.train)
    if held_rows:
        held_out = _part(held_rows, data, data.eval or data.train)
        same_kind = data.model_copy(update={"format": kind})
        format_of(same_kind, held_out.columns, held_out.rows, held_out.source)
    else:
        train, held_out = split(train, data)
    train = some(train, data.max_train, data.seed)
    held_out = some(held_out, data.max_eval, data.seed)

    builders = {"instruction": _instructions, "chat": _chats, "text": _texts}
    prepared = builders[kind](recipe, tokenizer, train, held_out)
    prepared.stats = {"format": kind, "source": data.train, **prepared.stats}
    return prepared


def _part(rows: Rows, data: DataSection, source: str) -> Part:
    return Part(source, columns_of(rows, data.columns, source), rows, list(range(len(rows))))


def load_rows(data: DataSection) -> tuple[Rows, Rows]:
    """Read training rows, and held-out rows where the data bring some."""
    packaged = kind_of(data.train) == "packaged"
    if packaged:
        train, held_out = read_packaged(data.train)
        held_out = held_out if has_test_split(data) else []
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


def split(part: Part, data: DataSection) -> tuple[Part, Part]:
    """Hold out a share of the rows; rows with equal prompts stay on one side."""
    total = len(part.rows)
    wanted = round(data.eval_fraction * total)
    if data.eval_fraction and total > 1:
        wanted = max(wanted, 1)
    columns = part.columns
    asked = ("instruction", "input", "text", "text_pair")
    names = [columns[n] for n in asked if n in columns] or list(columns.values())
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(part.rows):
        key = "\n".join(normal_form(str(row.get(name, ""))) for name in names)
        groups.setdefault(key, []).append(index)
    keys = list(groups)
    random.Random(data.seed).shuffle(keys)
    held: set[int] = set()
    for key in keys:
        if len(held) >= wanted:
            break
        if len(held) + len(groups[key]) < total:
            held.update(groups[key])
    return part.select([i for i in range(total) if i not in held]), part.select(sorted(held))


def some(part: Part, limit: int | None, seed: int) -> Part:
    """At most so many rows, drawn by a seed, in their order."""
    total = len(part.rows)
    if limit is None or limit >= total:
        return part
    return part.select(sorted(random.Random(seed).sample(range(total), limit)))


def _fit(lengths: list[int], recipe: Recipe, part: Part) -> list[int]:
    """Return which examples to keep under the recipe's policy on long ones."""
    data = recipe.data
    long = [i for i, n in enumerate(lengths) if n > data.max_length]
    if long and data.too_long == "error":
        first = f"example {part.places[long[0]]} has {lengths[long[0]]} tokens"
        raise DataError(
            f"{part.source}: {first}, more than "
            f"data.max_length = {data.max_length} ({len(long)} such of {len(lengths)}, the longest "
            f"{max(lengths)}); raise data.max_length, or set data.too_long to truncate or skip"
        )
    if data.too_long == "skip":
        kept = [i for i, n in enumerate(lengths) if n <= data.max_length]
        if lengths and not kept:
            raise DataError(
                f"{part.source}: every example is longer than data.max_length = {data.max_length}"
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

    def encode(part: Part) -> tuple[list[PromptAnswer], int]:
        try:
            encoded = template.encode(examples_of(part))
        except TemplateError as error:
            raise DataError(f"{part.source}: {error}") from None
        lengths = [len(e.prompt_ids) + len(e.answer_ids) for e in encoded]
        kept = [_shorten(encoded[i], data.max_length) for i in _fit(lengths, recipe, part)]
        return kept, len(encoded) - len(kept)

    learnt, skipped = encode(train)
    held, _ = encode(held_out)
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

    def encode(part: Part) -> tuple[list[Tokens], int]:
        texts = texts_of(part)
        encoded = tokenizer(texts)["input_ids"] if texts else []
        if eos is not None:
            encoded = [ids if ids and ids[-1] == eos else [*ids, eos] for ids in encoded]
        if data.packing:  # a long text goes on in the next row
            return [Tokens(ids, ids) for ids in encoded], 0
        keep = _fit([len(ids) for ids in encoded], recipe, part)
        short = [encoded[i][: data.max_length] for i in keep]
        return [Tokens(ids, ids) for ids in short], len(encoded) - len(short)

    if recipe.evaluate.metric == "choice":
        raise DataError("evaluate.metric 'choice' needs instruction data; these are plain text")
    learnt, skipped = encode(train)
    held, _ = encode(held_out)
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
    data = recipe.data
    if not tokenizer.chat_template:
        raise DataError(
            "the data are conversations, but the model's tokenizer has no chat template; "
            "choose a model made for chat"
        )
    if recipe.evaluate.metric == "choice":
        raise DataError("evaluate.metric 'choice' needs instruction data; these are conversations")

    def read(part: Part) -> tuple[list[Messages], list[int]]:
        chats = conversations_of(part, data.system)
        lengths = []
        for (where, _), messages in zip(part, chats, strict=True):
            try:
                lengths.append(chat_length(tokenizer, messages))
            except TemplateError as error:
                raise DataError(f"{where}: {error}") from None
        keep = _fit(lengths, recipe, part)
        return [chats[i] for i in keep], [lengths[i] for i in keep]

    learnt, lengths = read(train)
    held, _ = read(held_out)
    try:
        dataset, marks_needed = _chat_dataset(learnt + held, tokenizer, data.answers_only)
    except TemplateError as error:  # of the first messages of a conversation
        raise DataError(f"{data.train}: {error}") from None
    stats = {
        "train_examples": len(learnt),
        "eval_examples": len(held),
        "train_tokens": sum(lengths),
        "longest": max(lengths),
        "mean_length": sum(lengths) / len(lengths),
        "skipped": len(train.rows) - len(learnt),
    }
    return PreparedData(
        "chat",
        dataset.select(range(len(learnt))),
        dataset.select(range(len(learnt), len(dataset))) if held else None,
        collator=None,
        assistant_only_loss=marks_needed,
        stats=stats,
    )


def _chat_dataset(chats: list[Messages], tokenizer: Any, answers_only: bool) -> tuple[Any, bool]:
    """Give TRL the conversations so that it learns the right part of them.

    The second result says that only a template with {% generation %} marks can tell that part.
    """
    from datasets import Dataset

    if answers_only:
        if all(has_one_answer(chat) for chat in chats):
            rows = [{"prompt": chat[:-1], "completion": chat[-1:]} for chat in chats]
            return Dataset.from_list(rows), False
        labelled = [tokens for chat in chats if (tokens := learn_answers(tokenizer, chat))]
        if len(labelled) == len(chats):
            return Dataset.from_list(list(_unpacked(labelled))), False
    return Dataset.from_list([{"messages": chat} for chat in chats]), answers_only
