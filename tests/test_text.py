"""Text as windows of token ids: what is packed, what is skipped and what is refused."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import secateur as sc
from secateur.data.text import windows
from secateur.errors import DataError, SourceError
from secateur.models import TextSpec
from secateur.models.text import tokenizer

IDS = TextSpec(vocabulary=100, context=64)


@pytest.fixture(scope="module")
def spec(language):
    return sc.source_of(sc.load_model(language)).input


def test_what_a_model_says_about_its_text(spec, language):
    assert spec == TextSpec(str(language), "", 96, 64, causal=True)


def test_a_text_is_packed_whole(spec, text_file):
    found = windows(text_file, spec, 16)
    ids = tokenizer(spec)(text_file.read_text(), add_special_tokens=False)["input_ids"]
    assert torch.cat(found.items).tolist() == ids[: len(ids) // 16 * 16]
    assert found.records == 400
    assert not found.skipped


def test_documents_are_joined_with_the_end_of_text(spec):
    found = windows(["the cat", "sat on a mat"], spec, 3)
    ids = [tokenizer(spec)(t)["input_ids"] for t in ("the cat", "sat on a mat")]
    assert torch.cat(found.items).tolist() == [*ids[0], 2, *ids[1]][: len(found.items) * 3]


@given(st.integers(2, 20), st.integers(1, 20), st.integers(0, 80))
def test_windows_of_token_ids(length, stride, count):
    ids = [torch.arange(count)]
    expected = [list(range(i, i + length)) for i in range(0, count - length + 1, stride)]
    if not expected:
        with pytest.raises(DataError, match=r"not enough for one window|there is no text"):
            windows(ids, IDS, length, stride)
        return
    assert [w.tolist() for w in windows(ids, IDS, length, stride).items] == expected


def test_what_a_tokenizer_puts_around_a_text_is_put_around_every_window(tmp_path, language):
    from tokenizers import Tokenizer, processors

    for file in language.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tool = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tool.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    tool.save(str(tmp_path / "tokenizer.json"))
    found = windows(["the cat sat on a mat"] * 9, TextSpec(str(tmp_path), vocabulary=96), 8)
    assert {(w[0].item(), w[-1].item(), len(w)) for w in found.items} == {(1, 2, 8)}


def test_files_and_folders(spec, tmp_path):
    lines = [json.dumps({"text": "the cat sat on a mat " * 5}), "", json.dumps("rain fell " * 9)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.txt").write_text("dogs bark at night " * 9)
    (tmp_path / "c.png").write_bytes(b"no text")
    whole = windows(tmp_path, spec, 8)
    parts = [windows(tmp_path / name, spec, 8) for name in ("a.jsonl", "b.txt")]
    assert len(whole.items) >= sum(len(p.items) for p in parts)
    assert len(windows([tmp_path / "a.jsonl", tmp_path / "b.txt"], spec, 8).items) == len(whole.items)


def test_bad_lines_are_skipped_and_named(spec, tmp_path):
    good = json.dumps({"text": "the cat sat on a mat while rain fell"}).encode()
    bad = [b"{not json", b"3", b'{"title": "x"}', b"\xff\xfe", b"null"]
    file = tmp_path / "mixed.jsonl"
    file.write_bytes(b"\n".join([*[good] * 20, *bad]))
    found = windows(file, spec, 8, broken=0.3)
    assert [name.rpartition(":")[2] for name in found.skipped] == ["21", "22", "23", "24", "25"]
    assert found.skipped[f"{file}:24"] == "not UTF-8"
    assert found.skipped[f"{file}:23"] == "no field 'text'"
    with pytest.raises(DataError, match=r"5 of 25 lines or records cannot be read, at most 10% may fail"):
        windows(file, spec, 8)
    assert sc.batches(file, spec, window=8, broken=0.3, limit=3).skipped == found.skipped


def test_a_dataset_with_a_column_of_text(spec):
    from datasets import Dataset

    data = Dataset.from_dict({"id": list(range(40)), "text": ["the cat sat on a mat"] * 39 + [None]})
    found = windows(data, spec, 8)
    assert found.skipped == {"row 39": "'text' is a NoneType"}
    with pytest.raises(DataError, match="no column of text; its columns are id"):
        windows(data.remove_columns("text"), spec, 8)


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ("nowhere.txt", {}, "'nowhere.txt' does not exist"),
        (["", "  "], {}, "there is no text"),
        ([], {}, "there is no text"),
        (["the cat"], {"length": 32}, "not enough for one window of 32"),
        (["the cat"] * 99, {"length": 65}, "a window of 65 tokens is longer than the model's context of 64"),
        (["the cat"] * 99, {"length": 1}, "at least 2 tokens"),
        (["the cat"] * 99, {"stride": 0}, "a stride of at least 1"),
        (torch.full((2, 16), 96), {}, "token id 96 does not exist: the model knows 96"),
        (torch.rand(2, 16), {"length": 8}, r"expected token ids \[N, T\] of whole numbers"),
        ([{"title": "x"}], {}, "found a dict with title; expected 'text' or 'input_ids'"),
        (3, {}, "cannot read text from a int"),
        ([object()], {}, "text 0 is a object"),
    ],
)
def test_what_is_refused(spec, data, options, message):
    with pytest.raises(DataError, match=message):
        windows(data, spec, **{"length": 8, **options})


def test_a_tensor_of_token_ids_is_taken_as_it_is():
    ids = torch.randint(0, 100, (5, 12))
    assert torch.equal(torch.stack(windows(ids, IDS, 8, 4).items), ids)


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(SourceError, match=r"no tokenizer could be opened from .* put tokenizer\.json beside"):
        windows(["the cat"] * 99, TextSpec(str(tmp_path), vocabulary=9), 8)


def test_batches_of_text(spec, text_file):
    data = sc.batches(text_file, spec, window=16, limit=10, seed=1)
    shapes = [tuple(b.shape) for b in data]
    assert shapes == [(4, 16), (4, 16), (2, 16)]
    assert all(b.dtype == torch.int64 for b in data)
    again = sc.batches(text_file, spec, window=16, limit=10, seed=1)
    assert all(map(torch.equal, data, again))
    assert not all(map(torch.equal, data, sc.batches(text_file, spec, window=16, limit=10, seed=2)))
