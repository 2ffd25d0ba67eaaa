"""Tasks of lm-eval on a cut model, on local data."""

import json

import pytest
import torch

import secateur as sc
from secateur.errors import DataError
from secateur.models.text import tokenizer

TASK = """
task: pets
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: " "
metric_list:
  - metric: acc
"""
ROWS = [
    {"question": "the cat sat on a", "choices": ["mat", "dog", "night"], "answer": 0},
    {"question": "while rain fell", "choices": ["and", "bark", "asked"], "answer": 1},
    {"question": "nobody asked why", "choices": ["cat", "dogs", "rain"], "answer": 2},
    {"question": "dogs bark at", "choices": ["night", "sat", "the"], "answer": 0},
]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "pets.yaml").write_text(TASK.format(file=tmp_path / "rows.jsonl"))
    return tmp_path


def accuracy(model) -> float:
    """Share of rows whose right choice is the likeliest."""
    tool, right = tokenizer(sc.source_of(model).input), 0
    for row in ROWS:
        likely = []
        for choice in row["choices"]:
            before, after = (tool(t)["input_ids"] for t in (row["question"], choice))
            with torch.no_grad():
                log_p = model(torch.tensor([before + after])).logits[0].log_softmax(-1)
            likely.append(sum(float(log_p[len(before) + i - 1, token]) for i, token in enumerate(after)))
        right += likely.index(max(likely)) == row["answer"]
    return right / len(ROWS)


def test_a_task_on_local_data(language, folder):
    model = sc.load_model(language)
    plan = sc.allocate(sc.score(None, "magnitude", model=model, anatomy=sc.inspect(model)), 0.8, "uniform", align=1)
    small = sc.prune(model, plan, compensate="none")
    for m in (model, small):
        assert sc.tasks(m, ["pets"], folder=folder)["pets"]["acc"] == pytest.approx(accuracy(m))


def test_the_command(secateur, language, folder):
    done = secateur("evaluate", language, "--tasks", "pets", "--task-folder", folder)
    assert done.status == 0, done.err
    assert "pets acc" in done.out
    assert "did you mean 'hellaswag'?" in secateur("evaluate", language, "--tasks", "helaswag").err


def test_only_causal_models_have_tasks(vit):
    with pytest.raises(DataError, match="tasks are for causal language models"):
        sc.tasks(vit, ["pets"])
