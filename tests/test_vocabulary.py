"""tokenizer_source: embedding rows follow their tokens, checked token by token on real small models and tokenizers."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pico
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from plait import merge
from plait.errors import CheckpointError, RecipeError
from plait.plan import make_plan
from plait.recipe import load_recipe
from plait.sources import SafetensorsSource
from plait.sources.remapped import LACKING, Fill, Holder, Remapped, Rows
from plait.tokens import is_tokenizer_file, read_tokens

WORDS = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(37))]
NAMES = ("model.embed_tokens.weight", "lm_head.weight")


def word_level(words: list[str], added: tuple[str, ...] = ()) -> Tokenizer:
    core = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in added])
    return core


def byte_pairs() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("a", "b"), ("ab", "c"), ("d", "e")]
    words = [*alphabet, *("".join(pair) for pair in merges)]
    core = Tokenizer(models.BPE({word: place for place, word in enumerate(words)}, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    core.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    return core


def put_tokenizer(folder: Path, core: Tokenizer, **more: Any) -> None:
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, **more).save_pretrained(folder)


def llama(folder: Path, rows: int, like: Path | None = None, seed: int = 0) -> Path:
    """A model whose other tensors are `like`'s with noise; its embeddings are its own."""
    pico.make_llama(folder, seed=seed, vocab=rows)
    if like is not None:
        own, other = load_file(folder / "model.safetensors"), load_file(like / "model.safetensors")
        noise = torch.Generator().manual_seed(seed)
        for name, values in other.items():
            if name not in NAMES:
                own[name] = values + 0.01 * torch.randn(values.shape, generator=noise)
        save_file(own, folder / "model.safetensors", {"format": "pt"})
    return folder


def ids_of(folder: Path) -> dict[str, int]:
    return Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return {name: values.float().numpy() for name, values in pico.read(folder).items()}


def recipe(base: Path | None, *experts: Path, source: str | None = "base", **more: Any) -> dict[str, Any]:
    method = {"merge_method": "linear", "parameters": {"weight": 0.5}}
    if base is not None:
        method = {"merge_method": "task_arithmetic", "base_model": str(base), "parameters": {"weight": 0.5}}
    listed = [{"model": str(expert)} for expert in experts]
    return {**method, "models": listed, **({"tokenizer_source": source} if source else {}), **more}


def loads(folder: Path, text: str) -> tuple[transformers.PreTrainedModel, list[int]]:
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    model, info = loaded
    assert not any(info.values()), info
    ids = transformers.AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    assert torch.isfinite(model(torch.tensor([ids])).logits).all()
    return model, ids


def close(left: np.ndarray, right: np.ndarray) -> bool:
    return bool(np.allclose(left, right, rtol=0, atol=1e-6))


def files_of(folder: Path) -> dict[str, bytes]:
    skipped = ("plait.json", "README.md")
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name not in skipped}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = llama(tmp_path / "base", len(WORDS))
    put_tokenizer(folder, word_level(WORDS), unk_token="<unk>", eos_token="</s>")
    return folder


@pytest.fixture
def wider(tmp_path: Path, base: Path) -> Path:
    """An expert with three added tokens, in its vocabulary's last rows."""
    folder = llama(tmp_path / "wider", len(WORDS) + 3, base, seed=1)
    put_tokenizer(folder, word_level(WORDS, ("<a>", "<b>", "<c>")), unk_token="<unk>", pad_token="<c>")
    return folder


@pytest.fixture
def shuffled(tmp_path: Path, base: Path) -> Path:
    """An expert with the base's tokens at other ids, one of them lost and one new."""
    words = [*WORDS[1:-1], "other"]
    random.Random(3).shuffle(words)
    folder = llama(tmp_path / "shuffled", len(WORDS), base, seed=2)
    put_tokenizer(folder, word_level(["<unk>", *words]), unk_token="<unk>")
    return folder


def test_expert_with_added_tokens_is_cut_to_the_base(tmp_path: Path, base: Path, wider: Path) -> None:
    merge(recipe(base, wider), tmp_path / "out")
    merged, old, new = (tensors(folder) for folder in (tmp_path / "out", base, wider))
    for name in NAMES:
        assert close(merged[name], old[name] + 0.5 * (new[name][: len(WORDS)] - old[name]))
    _, ids = loads(tmp_path / "out", "w1 w5 <a>")
    assert len(ids) == 5  # <a> is three pieces again: '<', 'a', '>'
    notes = make_plan(load_recipe(recipe(base, wider))).notes
    assert any("3 of its tokens are left out ('<a>', …)" in note for note in notes), notes


def test_rows_follow_tokens_of_a_permuted_vocabulary(tmp_path: Path, base: Path, shuffled: Path) -> None:
    merge(recipe(base, shuffled), tmp_path / "out")
    merged, old, new = (tensors(folder) for folder in (tmp_path / "out", base, shuffled))
    own, theirs = ids_of(base), ids_of(shuffled)
    for name in NAMES:
        for token, place in own.items():
            row = new[name][theirs[token]] if token in theirs else old[name][place]
            assert close(merged[name][place], old[name][place] + 0.5 * (row - old[name][place])), token
    assert (merged[NAMES[0]][own["w36"]] == old[NAMES[0]][own["w36"]]).all()  # the token that the expert lost
    assert loads(tmp_path / "out", "w1 w36")[1] == [own["w1"], own["w36"]]


def test_union_has_every_token_and_no_recipe_order(tmp_path: Path, base: Path, wider: Path, shuffled: Path) -> None:
    third = llama(tmp_path / "third", len(WORDS) + 1, base, seed=4)
    put_tokenizer(third, word_level(WORDS, ("<b>",)), unk_token="<unk>")
    experts = (wider, shuffled, third)
    outs = [tmp_path / f"out{n}" for n in range(6)]
    for out, order in zip(outs, itertools.permutations(experts), strict=True):
        merge(recipe(base, *order, source="union"), out)
    assert all(files_of(out) == files_of(outs[0]) for out in outs)

    united = ids_of(outs[0])
    assert ids_of(base).items() <= united.items()
    # By name of model, then by id: shuffled, third, wider.
    assert [united[token] for token in ("other", "<b>", "<a>", "<c>")] == [40, 41, 42, 43]
    merged, old = tensors(outs[0]), tensors(base)
    for name in NAMES:
        assert len(merged[name]) == 44
        for token, place in united.items():
            have = [tensors(e)[name][ids_of(e)[token]] for e in sorted(experts) if token in ids_of(e)]
            row = old[name][place] if token in ids_of(base) else np.mean(have, axis=0)
            have += [row] * (len(experts) - len(have))
            assert close(merged[name][place], row + 0.5 * sum(each - row for each in have)), token
    model, ids = loads(outs[0], "w1 <b> other another")
    assert ids == [united["w1"], united["<b>"], united["other"], 0]  # 'other' is a word, and no part of one
    assert model.config.vocab_size == 44


def test_vocabulary_of_a_named_model(tmp_path: Path, base: Path, wider: Path, shuffled: Path) -> None:
    (base / "generation_config.json").write_text('{"eos_token_id": [2, 39], "temperature": 0.5}')
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "eos_token_id": 2, "pad_token_id": -1}))
    merge(recipe(base, wider, shuffled, source="shuffled"), tmp_path / "out")
    theirs = ids_of(shuffled)
    assert ids_of(tmp_path / "out") == theirs
    merged = tensors(tmp_path / "out")
    wide, old, new = (tensors(folder) for folder in (wider, base, shuffled))
    for name in NAMES:
        for token, place in theirs.items():
            row = old[name][ids_of(base)[token]] if token in ids_of(base) else new[name][place]
            others = wide[name][ids_of(wider)[token]] if token in ids_of(wider) else row
            assert close(merged[name][place], row + 0.5 * (new[name][place] - row) + 0.5 * (others - row)), token
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["eos_token_id"], written["pad_token_id"], written["vocab_size"]) == (theirs["</s>"], -1, 40)
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [theirs["</s>"]], "temperature": 0.5}  # w36 is gone
    spelt = merge(recipe(base, wider, shuffled, source=str(shuffled)), tmp_path / "spelt")
    assert files_of(spelt.path) == files_of(tmp_path / "out")
    listed = merge(
        recipe(base, wider, base, shuffled, source="shuffled"), tmp_path / "listed"
    )  # still known as the base
    assert files_of(listed.path) == files_of(tmp_path / "out")
    merge(recipe(base, wider, source="wider"), tmp_path / "wide")
    assert loads(tmp_path / "wide", "<c> w1")[1] == [42, ids_of(base)["w1"]]


def test_equal_vocabularies_change_nothing(tmp_path: Path) -> None:
    base = llama(tmp_path / "base", 48)  # eight rows of padding
    put_tokenizer(base, word_level(WORDS), unk_token="<unk>")
    experts = pico.experts(tmp_path / "experts", base, 2)
    without = merge(recipe(base, *experts, source=None), tmp_path / "without")
    for source in ("base", "union", "expert1"):
        asked = recipe(base, *experts, source=source)
        done = merge(asked, tmp_path / f"out-{source}")
        assert files_of(done.path) == files_of(without.path)
        plan = make_plan(load_recipe(asked))
        assert not any(isinstance(model.source, Remapped) for model in plan.opened())
        assert not plan.vocabulary.notes


def test_padding_rows(tmp_path: Path) -> None:
    base = llama(tmp_path / "base", 48)
    put_tokenizer(base, word_level(WORDS), unk_token="<unk>")
    short = llama(tmp_path / "short", 40, base, seed=1)  # the same tokens, no padding
    put_tokenizer(short, word_level(WORDS), unk_token="<unk>")
    taken = llama(tmp_path / "taken", 48, base, seed=2)  # padding put to use
    put_tokenizer(taken, word_level(WORDS, ("<a>",)), unk_token="<unk>")
    whole = llama(tmp_path / "whole", 48, base, seed=3)
    put_tokenizer(whole, word_level(WORDS), unk_token="<unk>")
    old, new = tensors(base), {folder.name: tensors(folder) for folder in (short, taken, whole)}
    merge(recipe(base, short, taken, whole), tmp_path / "out")
    merge(recipe(base, short, taken, whole, source="union"), tmp_path / "union")
    for name in NAMES:
        padding = old[name][40:] + 0.5 * (new["whole"][name][40:] - old[name][40:])
        assert close(tensors(tmp_path / "out")[name][40:], padding)
        united = tensors(tmp_path / "union")[name]
        assert close(united[41:], padding[1:])  # no more rows than before: <a> takes one of the padding
        assert close(united[40], new["taken"][name][40] * 1.5 - 0.5 * new["taken"][name][40])


def test_without_a_base_rows_come_from_those_that_have_them(tmp_path: Path, base: Path, wider: Path) -> None:
    merge(recipe(None, wider, base, source="union"), tmp_path / "out")
    old, new, merged = (tensors(folder) for folder in (base, wider, tmp_path / "out"))
    for name in NAMES:
        assert close(merged[name][:40], (old[name] + new[name][:40]) / 2)
        assert (merged[name][40:] == new[name][40:]).all()
    with pytest.raises(RecipeError, match="base needs a base_model"):
        make_plan(load_recipe(recipe(None, wider, base)))


def test_low_precision_leaves_missing_tokens_alone(tmp_path: Path, base: Path) -> None:
    """A bfloat16 expert without a token must not pull a float32 base's row to its own precision."""
    folder = llama(tmp_path / "half", 39, base, seed=1)
    weights = {name: values.bfloat16() for name, values in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    put_tokenizer(folder, word_level(WORDS[:-1]), unk_token="<unk>")
    merge(recipe(base, folder), tmp_path / "out")
    for name in NAMES:
        assert (tensors(tmp_path / "out")[name][-1] == tensors(base)[name][-1]).all()


def test_tied_byte_pair_models(tmp_path: Path) -> None:
    base = pico.make_llama(tmp_path / "base", tied=True, vocab=259)
    put_tokenizer(base, byte_pairs())
    core = byte_pairs()
    core.add_special_tokens([AddedToken("<|end|>", special=True)])
    expert = pico.make_llama(tmp_path / "expert", seed=1, tied=True, vocab=260)
    put_tokenizer(expert, core)
    merge(recipe(base, expert, source="union"), tmp_path / "out")
    merged, new = tensors(tmp_path / "out"), tensors(expert)
    assert close(merged[NAMES[0]][259], new[NAMES[0]][259])
    _, ids = loads(tmp_path / "out", "abc<|end|>de")
    assert ids == [257, 259, 258]


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")  # peft asks for an attribute by its old name
def test_adapters_have_the_rows_of_what_they_sit_on(tmp_path: Path, base: Path, wider: Path) -> None:
    adapter = pico.lora_adapter(tmp_path / "lora", base)
    merge(recipe(base, adapter, wider, source="union"), tmp_path / "out")
    old, new, merged = (tensors(folder) for folder in (base, wider, tmp_path / "out"))
    for name in NAMES:
        assert close(merged[name][:40], old[name] + 0.5 * (new[name][:40] - old[name]))
        assert close(merged[name][40:], new[name][40:])
    loads(tmp_path / "out", "w1 <a>")
    merge(recipe(base, adapter, source="lora"), tmp_path / "alone")
    for name in NAMES:
        assert (tensors(tmp_path / "alone")[name] == old[name]).all()

    elsewhere = pico.lora_adapter(tmp_path / "other", wider)  # on a base of its own, with another vocabulary
    merge(recipe(base, Path(f"{wider}+{elsewhere}"), adapter), tmp_path / "two")
    for name in NAMES:
        assert close(tensors(tmp_path / "two")[name], old[name] + 0.5 * (new[name][:40] - old[name]))


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")  # peft asks for an attribute by its old name
def test_adapters_that_hold_embeddings(tmp_path: Path, base: Path, wider: Path) -> None:
    updating = pico.lora_adapter(tmp_path / "updating", base, targets=("q_proj", "embed_tokens"))
    make_plan(load_recipe(recipe(base, updating, wider)))  # the base's rows stay as they are
    with pytest.raises(CheckpointError, match=r"updating: updates 'model\.embed_tokens\.weight' of .* merge it into"):
        make_plan(load_recipe(recipe(base, updating, wider, source="union")))

    saved = ["embed_tokens", "lm_head"]
    replacing = pico.lora_adapter(tmp_path / "replacing", wider, modules_to_save=saved)
    put_tokenizer(replacing, word_level(WORDS, ("<a>", "<b>", "<c>")), unk_token="<unk>")
    with pytest.raises(CheckpointError, match="replacing: replaces the embeddings with 43 rows of its own"):
        make_plan(load_recipe(recipe(base, replacing)))
    with pytest.raises(CheckpointError, match=r"the vocabularies differ \(43 tokens in .*replacing, 40 in .*base\)"):
        make_plan(load_recipe(recipe(base, replacing, source=None)))
    merge(recipe(base, replacing, source="replacing"), tmp_path / "out")
    old, own = tensors(base), load_file(replacing / "adapter_model.safetensors")
    for name, stored in zip(NAMES, ("model.embed_tokens", "lm_head"), strict=True):
        values = own[f"base_model.model.{stored}.weight"].numpy()
        assert close(tensors(tmp_path / "out")[name][40:], values[40:])
        assert close(tensors(tmp_path / "out")[name][:40], (old[name] + values[:40]) / 2)
    loads(tmp_path / "out", "w1 <a>")


def test_refused_without_tokenizer_source(base: Path, wider: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        make_plan(load_recipe(recipe(base, wider, source=None)))
    assert (
        f"the vocabularies differ (43 tokens in {wider}, 40 in {base}); add tokenizer_source: base (or union) to match "
        "them token by token"
    ) in str(caught.value)


def test_unknown_target(base: Path, wider: Path) -> None:
    with pytest.raises(RecipeError, match="tokenizer_source: 'widr' is no model of this recipe; did you mean 'wider'"):
        make_plan(load_recipe(recipe(base, wider, source="widr")))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", "not valid JSON"),
        ("tokenizer.json", "[]", "not a JSON object"),
        ("tokenizer.json", "{}", "no table of tokens under model.vocab"),
        ("tokenizer.json", '{"model": {"vocab": [["a"]]}}', "no table of tokens"),
        ("tokenizer.json", '{"model": {"vocab": {"a": -1}}}', "token 'a' has the id '-1'"),
        ("tokenizer.json", '{"model": {"vocab": {"a": true}}}', "token 'a' has the id 'True'"),
        ("tokenizer.json", '{"model": {"vocab": {"a": 99999999999}}}', "token 'a' has the id '99999999999'"),
        ("tokenizer.json", '{"model": {"vocab": {"a": 0, "a": 1}}}', "twice"),
        ("tokenizer.json", '{"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 1}]}', "added_tokens is not a list"),
        ("tokenizer.json", '{"model": {"vocab": {}}}', "holds no tokens"),
        ("vocab.json", '{"a": "b"}', "token 'a' has the id 'b'"),
        ("tokenizer.model", "\x0a", "tokenizer.model: this kind of tokenizer is not read here.*save_pretrained"),
        ("notes.txt", "", "has no tokenizer.json, vocab.json or vocab.txt in .* Copy the tokenizer files"),
    ],
)
def test_bad_tokenizers_are_sentences(base: Path, wider: Path, name: str, content: str, message: str) -> None:
    for path in wider.glob("*token*"):
        path.unlink()
    (wider / name).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        make_plan(load_recipe(recipe(base, wider)))


def test_tokenizers_in_older_forms(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\na\r\n##b\n", newline="")
    found = read_tokens(tmp_path)
    assert found is not None
    assert found.ids == {"[PAD]": 0, "a": 1, "##b": 2}
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1}')
    (tmp_path / "added_tokens.json").write_text('{"<x>": 2}')
    found = read_tokens(tmp_path)
    assert found is not None
    assert found.ids == {"a": 0, "b": 1, "<x>": 2}
    assert found.added["<x>"]["special"]
    pieces: list[Any] = [["<unk>", 0.0], ["▁a", -1.5]]
    added = [{"id": 2, "content": "<y>", "special": False}]
    (tmp_path / "tokenizer.json").write_text(
        json.dumps({"model": {"type": "Unigram", "vocab": pieces}, "added_tokens": added})
    )
    found = read_tokens(tmp_path)
    assert found is not None
    assert found.ids == {"<unk>": 0, "▁a": 1, "<y>": 2}
    assert not found.added["<y>"]["special"]


def test_union_needs_a_tokenizer_json_to_write(base: Path, wider: Path) -> None:
    words = ids_of(base)
    (base / "tokenizer.json").unlink()
    (base / "vocab.json").write_text(json.dumps(words))
    make_plan(load_recipe(recipe(base, wider)))
    with pytest.raises(CheckpointError, match=r"a union needs a tokenizer\.json .* only vocab\.json"):
        make_plan(load_recipe(recipe(base, wider, source="union")))
    (base / "tokenizer.json").write_text(json.dumps({"model": {"vocab": words}}))
    with pytest.raises(CheckpointError, match="is not a usable tokenizer"):
        make_plan(load_recipe(recipe(base, wider, source="union")))


def test_the_union_takes_the_other_files_of_the_base(tmp_path: Path, base: Path, wider: Path) -> None:
    (base / "chat_template.jinja").write_text("base")
    (wider / "chat_template.jinja").write_text("wider")
    (base / "notes.json").write_text("{}")
    merge(recipe(base, wider, source="union"), tmp_path / "united")
    assert (tmp_path / "united" / "chat_template.jinja").read_text() == "base"
    shutil.rmtree(tmp_path / "united")
    merge(recipe(base, wider, source="wider"), tmp_path / "united")
    assert (tmp_path / "united" / "chat_template.jinja").read_text() == "wider"
    assert (tmp_path / "united" / "notes.json").exists()
    assert is_tokenizer_file("sentencepiece.bpe.model")
    assert is_tokenizer_file("additional_chat_templates/a.jinja")
    assert not any(
        map(is_tokenizer_file, ("config.json", "generation_config.json", "notes.txt", "1_Pooling/vocab.txt"))
    )


def test_remapped_source_reads_any_span(tmp_path: Path) -> None:
    values = torch.arange(30, dtype=torch.float32).reshape(6, 5)
    save_file({"a.wte.weight": values, "b": torch.ones(3)}, tmp_path / "model.safetensors")
    inner = SafetensorsSource(tmp_path, "inner")
    index = np.array([0, 1, 2, LACKING, 5, LACKING, 0, 1, 3])
    row = torch.full((6, 5), -1.0)
    save_file({"x": row}, tmp_path / "other.safetensors")
    other = Holder(SafetensorsSource(tmp_path / "other.safetensors", "other"), "x", np.array([LACKING] * 4 + [0] * 5))
    rows = Rows(Holder(inner, "a.wte.weight", index), Fill(None, [other]))
    source = Remapped(inner, {"a.wte.weight": rows}, {}, {})
    whole = torch.stack([values[i] if i >= 0 else torch.full((5,), -float(at == 5)) for at, i in enumerate(index)])
    assert source.specs["a.wte.weight"].shape == (9, 5)
    assert source.read("b", 1, 3).tolist() == [1, 1]
    for start in range(46):
        for stop in range(start, 46):
            assert torch.equal(source.read("a.wte.weight", start, stop), whole.reshape(-1)[start:stop])
    assert source.stamp() != inner.stamp()
    assert source.fingerprint() == inner.fingerprint()
    source.close()
    with pytest.raises(CheckpointError, match="closed"):
        source.read("a.wte.weight", 0, 1)
