"""From an instruction example to a prompt and an answer, and from those to tokens.

Prompt and answer are tokenised apart, so a prompt has the same tokens in training, in evaluation
and in use. The answer ends with the end-of-sequence token, which is learnt like the rest of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


class TemplateError(ValueError):
    """A template can't be used with this tokenizer."""


@dataclass(frozen=True)
class Example:
    """One task with its answer, as the data have it."""

    instruction: str
    input: str
    output: str


@dataclass(frozen=True)
class PromptAnswer:
    """One example as text and as tokens; `answer_ids` end with the end-of-sequence token."""

    prompt: str
    answer: str
    prompt_ids: list[int]
    answer_ids: list[int]


def apply_template(tokenizer: Any, messages: list[dict[str, str]], **settings: Any) -> str:
    """Messages as text, by the tokenizer's chat template, which jinja runs in its sandbox.

    Raises:
        TemplateError: the template refuses the messages, or does what the sandbox forbids.
    """
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **settings))
    except Exception as error:  # a template is a program, and may fail in any way
        raise TemplateError(f"the tokenizer's chat template refuses it: {error}") from None


class Template:
    """Turn examples into prompts and answers in the form that a recipe asks for.

    `name` is "alpaca", "chat" (the tokenizer's chat template), "plain" (instruction, input, and
    the answer on a new line) or a format string with {instruction}, {input} and {system}.
    """

    def __init__(self, name: str, tokenizer: Any, system: str | None = None) -> None:
        self.name, self.tokenizer, self.system = name, tokenizer, system
        if tokenizer.eos_token_id is None:
            raise TemplateError(
                "the tokenizer has no end-of-sequence token, so no answer could ever end"
            )
        if name == "chat" and not tokenizer.chat_template:
            raise TemplateError(
                "data.template is 'chat', but the model's tokenizer has no chat template; "
                "use 'alpaca', 'plain' or a template of your own"
            )
        self._closing = self._chat_closing() if name == "chat" else ""

    def prompt(self, example: Example) -> str:
        """Return the text before the answer."""
        task, given = example.instruction, example.input
        if self.name == "chat":
            return self._chat(task, given)
        if self.name == "alpaca":
            form = ALPACA_WITH_INPUT if given else ALPACA
            return form.format(instruction=task, input=given)
        if self.name == "plain":
            return f"{task}\n{given}\n" if given else f"{task}\n"
        return self.name.format(instruction=task, input=given, system=self.system or "")

    def encode(self, examples: Sequence[Example]) -> list[PromptAnswer]:
        """Turn examples into prompts and answers, as text and as tokens."""
        if not examples:
            return []
        prompts = [self.prompt(example) for example in examples]
        answers = [example.output for example in examples]
        prompt_ids = self._prompt_ids(prompts)
        answer_ids = self.encode_answers(answers)
        parts = zip(prompts, answers, prompt_ids, answer_ids, strict=True)
        return [PromptAnswer(*part) for part in parts]

    def encode_answers(self, answers: Sequence[str]) -> list[list[int]]:
        """Return the tokens of answers, each with what ends it."""
        texts = [answer + self._closing for answer in answers]
        eos = self.tokenizer.eos_token_id
        encoded = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return [ids if ids and ids[-1] == eos else [*ids, eos] for ids in encoded]

    def _prompt_ids(self, prompts: list[str]) -> list[list[int]]:
        # A chat template writes the special tokens itself.
        special = self.name != "chat"
        encoded = self.tokenizer(prompts, add_special_tokens=special)["input_ids"]
        eos, bos = self.tokenizer.eos_token_id, self.tokenizer.bos_token_id
        if special and eos != bos:  # some tokenizers end every text, which a prompt must not
            return [ids[:-1] if len(ids) > 1 and ids[-1] == eos else ids for ids in encoded]
        return list(encoded)

    def _messages(self, task: str, given: str) -> list[dict[str, str]]:
        user = f"{task}\n\n{given}" if task and given else task or given
        system = [{"role": "system", "content": self.system}] if self.system is not None else []
        return [*system, {"role": "user", "content": user}]

    def _chat(self, task: str, given: str) -> str:
        return apply_template(
            self.tokenizer, self._messages(task, given), add_generation_prompt=True
        )

    def _chat_closing(self) -> str:
        """Find what the chat template writes after an answer, up to the end-of-sequence token."""
        mark = "velora-answer"
        messages = [*self._messages("question", ""), {"role": "assistant", "content": mark}]
        text = apply_template(self.tokenizer, messages)
        closing = text.rpartition(mark)[2]
        eos = str(self.tokenizer.eos_token)
        return closing[: closing.index(eos) + len(eos)] if eos in closing else closing.rstrip()
