"""Models larger than memory: what is cut block by block from files is what is cut in memory."""

import json
import sys
from dataclasses import fields

import pytest
import torch
from safetensors.torch import load_file, save_file

import secateur as sc
from secateur.errors import AnatomyError, ArtifactError, BudgetError, SecateurError, SourceError
from secateur.models import build, skeleton
from secateur.nn.weightless import is_weightless
from secateur.streaming import Streamed, parse_bytes
from secateur.streaming.sums import collect, score_blocks
from secateur.streaming.walk import States, Walk

TEXT = {"window": 16}
OPTIONS = {"keep_params": 0.8, "align": 1, "limit": 12, "held_out": 6, "measure": False, **TEXT}
FORWARD = {"loss": (), "weighting": None, "limit": 12, **TEXT}


def architectures() -> dict:
    """Tiny transformers models that call their blocks in different ways."""
    import transformers as t

    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 96}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    gpt2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 96, "n_positions": 64}
    special = {"bos_token_id": 1, "eos_token_id": 2}
    return {
        "gemma3": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**size, **heads, head_dim=8, sliding_window=4)),
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(**gpt2, **special)),
        "bert": lambda: t.BertForMaskedLM(t.BertConfig(**tower, vocab_size=96, max_position_embeddings=64)),
        "vit": lambda: t.ViTModel(t.ViTConfig(**tower, image_size=32, patch_size=8)),
    }


@pytest.fixture(scope="module", params=["gemma3", "gpt2", "bert", "vit"])
def folder(request, tmp_path_factory):
    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("models") / request.param
    architectures()[request.param]().save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def bf16(language, tmp_path_factory):
    """The tiny LLaMA in bfloat16, in several files."""
    import shutil

    out = tmp_path_factory.mktemp("bf16") / "llama"
    shutil.copytree(language, out)
    (out / "model.safetensors").unlink()
    sc.load_model(language).bfloat16().save_pretrained(out, max_shard_size="20KB")
    assert len(list(out.glob("*.safetensors"))) > 2
    return out


def data_of(model):
    """Something that a tiny model reads."""
    if sc.source_of(model).text is None:
        return torch.randn(18, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return torch.randint(5, 96, (18, 16), generator=torch.Generator().manual_seed(0))


def walk_of(source, anatomy, data, room=1 << 20):
    with source.filled(source.outside(anatomy.blocks)):
        return Walk(source.model, anatomy.blocks, data, States(room), "calibration", "float32")


@pytest.mark.filterwarnings("ignore::secateur.errors.SecateurWarning")
def test_anatomy_without_weights(folder):
    dense = sc.load_model(folder)
    bare = skeleton(sc.source_of(dense))
    assert all(p.is_meta for p in bare.parameters())
    assert not any(b.is_meta for b in bare.buffers())
    a, b = sc.inspect(dense), sc.inspect(bare)
    assert (a.params, a.macs, a.blocks) == (b.params, b.macs, b.blocks)
    rest = {"residual", "qk_dim", "vo_dim", "head_dim", "blocks"}  # cut in models that are in memory
    ours, theirs = ({n: g for n, g in x.groups.items() if str(g.kind) not in rest} for x in (a, b))
    assert list(ours) == list(theirs)
    assert any(g.cuttable for g in ours.values())
    for one, other in zip(ours.values(), theirs.values(), strict=True):
        assert (one.reason, one.edits, one.rewritten) == (other.reason, other.edits, other.rewritten)
    assert sc.macs(bare) == sc.macs(dense)


def test_a_skeleton_computes_its_buffers(language):
    dense = sc.load_model(language)
    bare = skeleton(sc.source_of(dense))
    for name, buffer in build(sc.source_of(dense)).named_buffers():
        assert torch.equal(bare.get_buffer(name), buffer)
    assert bare.lm_head.weight is bare.model.embed_tokens.weight


@pytest.mark.parametrize("room", [0, 1 << 20])
def test_sums_are_those_of_calibration(language, text_file, room):
    dense = sc.load_model(language)
    expected = sc.calibrate(dense, text_file, **FORWARD)
    source = Streamed.open(language)
    anatomy = sc.inspect(source.model)
    data = sc.batches(text_file, sc.source_of(source.model).input, limit=12, **TEXT)
    walk = walk_of(source, anatomy, data, room)
    for i, path in enumerate(anatomy.blocks):
        with source.filled(source.names_in(path)):
            found = collect(source, anatomy, walk, i, covariance=True)
        assert found.images == expected.images
        for layer, sums in found.layers.items():
            for f in fields(sums):
                assert torch.equal(getattr(sums, f.name), getattr(expected.layers[layer], f.name)), (layer, f.name)
        expected.layers = {k: v for k, v in expected.layers.items() if k not in found.layers}
    assert not expected.layers
    assert all(p.is_meta for p in source.model.parameters())


@pytest.mark.parametrize("criterion", ["obs", "leverage", "cfsp"])
def test_scores_and_curves(language, text_file, criterion):
    statistics = sc.calibrate(sc.load_model(language), text_file, **FORWARD)
    expected = sc.score(statistics, criterion)
    source = Streamed.open(language)
    anatomy = sc.inspect(source.model)
    data = sc.batches(text_file, sc.source_of(source.model).input, limit=12, **TEXT)
    found = score_blocks(source, anatomy, walk_of(source, anatomy, data), criterion, curves=True)
    assert found.meta == expected.meta
    torch.testing.assert_close(found.blocks, expected.blocks)
    for name, values in expected.values.items():
        assert torch.equal(found.values[name], values)
        assert torch.equal(found.curves[name], expected.curves[name])


@pytest.mark.parametrize(
    ("criterion", "allocator", "compensator"),
    [("variance", "uniform", "affine"), ("cfsp", "cfsp", "mean"), ("magnitude", "uniform", "none")],
)
def test_the_same_cut(language, text_file, tmp_path, criterion, allocator, compensator):
    methods = {"criterion": criterion, "allocator": allocator, "compensator": compensator}
    whole = sc.compress(language, text_file, **methods, **OPTIONS)
    streamed = sc.compress(language, text_file, out=tmp_path / "small", memory_budget="6GB", **methods, **OPTIONS)
    assert streamed.plan == whole.plan
    assert streamed.fidelity == whole.fidelity
    assert streamed.table == whole.table
    ids = torch.randint(3, 96, (2, 12))
    with torch.no_grad():
        assert torch.equal(streamed.model(ids).logits, whole.model(ids).logits)
    assert streamed.model.lm_head.weight is streamed.model.model.embed_tokens.weight
    assert (tmp_path / "small" / "tokenizer.json").is_file()
    assert not (tmp_path / "small.work").exists()


@pytest.mark.filterwarnings("ignore::secateur.errors.SecateurWarning")
def test_other_architectures(folder, tmp_path):
    methods = {"criterion": "variance", "allocator": "uniform", "compensator": "affine"}
    data = data_of(sc.load_model(folder))
    whole = sc.compress(folder, data, **methods, **OPTIONS)
    streamed = sc.compress(folder, data, out=tmp_path / "small", memory_budget="6GB", **methods, **OPTIONS)
    assert streamed.plan == whole.plan
    assert streamed.fidelity == whole.fidelity
    for (name, one), other in zip(whole.model.state_dict().items(), streamed.model.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bfloat16_and_several_files(bf16, text_file, tmp_path, dtype):
    methods = {"criterion": "variance", "allocator": "curve", "compensator": "affine", "dtype": dtype}
    streamed = sc.compress(bf16, text_file, out=tmp_path / "small", memory_budget="6GB", **methods, **OPTIONS)
    dense = sc.load_model(bf16)
    assert {p.dtype for p in streamed.model.parameters()} == {torch.bfloat16}
    data = sc.batches(text_file, sc.source_of(dense).input, limit=18, **TEXT)
    order = sc.workflow.split(text_file, dense, streamed.settings)[0]
    statistics = sc.calibrate(dense, order, loss=(), weighting=None, dtype=dtype)
    again = sc.prune(dense, streamed.plan, stats=statistics)
    for batch in data:
        assert torch.equal(again(batch).logits, streamed.model(batch).logits)


def test_sequential(language, text_file, tmp_path):
    """As in memory, but for the weights of positions, which need gradients."""
    methods = {"criterion": "variance", "allocator": "uniform", "compensator": "sequential"}
    streamed = sc.compress(language, text_file, out=tmp_path / "small", memory_budget="6GB", **methods, **OPTIONS)
    dense = sc.load_model(language)
    data = sc.workflow.split(text_file, dense, streamed.settings)[0]
    statistics = sc.calibrate(dense, data, loss=(), weighting=None)
    again = sc.prune(dense, streamed.plan, compensate="sequential", stats=statistics, data=data)
    state = streamed.model.state_dict()
    for name, tensor in again.state_dict().items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-4, atol=1e-5)


def test_one_block_at_a_time(language, text_file, tmp_path, monkeypatch):
    most, whole = [0], Streamed.open(language).bytes_of(n for n, _ in sc.load_model(language).named_parameters())
    fill_ = Streamed.fill_

    def counted(self, names):
        fill_(self, names)
        most[0] = max(most[0], sum(p.nbytes for p in self.model.parameters() if not p.is_meta))

    monkeypatch.setattr(Streamed, "fill_", counted)
    methods = {"criterion": "variance", "allocator": "global", "compensator": "affine"}
    sc.compress(language, text_file, out=tmp_path / "small", memory_budget="6GB", **methods, **OPTIONS)
    assert 0 < most[0] < 0.4 * whole


def test_resumed_after_the_first_pass(language, text_file, tmp_path, monkeypatch):
    from secateur.streaming.cutting import Cutter

    methods = {"criterion": "variance", "allocator": "global", "compensator": "affine", "memory_budget": "6GB"}
    sc.compress(language, text_file, out=tmp_path / "a", **methods, **OPTIONS)
    with monkeypatch.context() as patch:
        patch.setattr(Cutter, "_write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            sc.compress(language, text_file, out=tmp_path / "b", **methods, **OPTIONS)
    assert not (tmp_path / "b").exists()
    resumed = sc.compress(language, text_file, out=tmp_path / "b", resume=True, **methods, **OPTIONS)
    assert resumed.reused == ["scores", "plan"]
    for file in (tmp_path / "a").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_a_damaged_file_of_several(language, text_file, tmp_path):
    methods = {"criterion": "magnitude", "allocator": "uniform", "compensator": "none", "memory_budget": "6GB"}
    sc.compress(language, text_file, out=tmp_path / "small", **methods, **OPTIONS)
    assert not is_weightless(sc.load(tmp_path / "small"))
    file = sorted((tmp_path / "small").glob("model-*.safetensors"))[1]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ArtifactError, match="is damaged or another model's"):
        sc.load(tmp_path / "small")
    file.unlink()
    with pytest.raises(ArtifactError, match="is missing"):
        sc.load(tmp_path / "small")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"criterion": "taylor"}, BudgetError, "'taylor' runs backward .* one that runs forward only .*variance"),
        ({"allocator": "amp-bisect"}, BudgetError, "'amp-bisect' runs the whole model"),
        ({"keep_params": None, "min_quality": 0.9}, BudgetError, "give keep_params or keep_macs"),
        ({"memory_budget": "1MB"}, BudgetError, "of 1MB is too small.* give at least"),
        ({"memory_budget": "lots"}, BudgetError, "'lots' is no size; give one like 6GB"),
        ({"out": None}, SecateurError, "needs out="),
    ],
)
def test_what_a_budget_cannot_do(language, text_file, tmp_path, settings, error, message):
    asked = {"memory_budget": "6GB", "out": tmp_path / "small", **OPTIONS, **settings}
    with pytest.raises(error, match=message):
        sc.compress(language, text_file, **asked)
    assert not (tmp_path / "small").exists()


def test_models_that_are_not_in_files(vit, language, tmp_path):
    with pytest.raises(SecateurError, match="give the folder of the model"):
        sc.compress(vit, "photos", out=tmp_path / "a", keep_params=0.8, memory_budget="1GB")
    with pytest.raises(SourceError, match="no local transformers folder"):
        sc.compress("timm/test_vit", "photos", out=tmp_path / "a", keep_params=0.8, memory_budget="1GB")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((language / name).read_bytes())
    state = load_file(tmp_path / "model.safetensors")
    save_file({k: v for k, v in state.items() if "layers.1.mlp.up" not in k}, tmp_path / "model.safetensors")
    with pytest.raises(SourceError, match=r"lacks 'model.layers.1.mlp.up_proj.weight'"):
        Streamed.open(tmp_path)
    save_file({k: v.to(torch.int8) for k, v in state.items()}, tmp_path / "model.safetensors")
    with pytest.raises(SourceError, match=r"stored as I8.* not quantised"):
        Streamed.open(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weights": 1}))
    with pytest.raises(SourceError, match="no index of weights"):
        Streamed.open(tmp_path)


def test_blocks_that_cannot_be_taken_one_by_one(language, text_file, monkeypatch):
    source = Streamed.open(language)
    anatomy = sc.inspect(source.model)
    inner = source.model.model
    data = sc.batches(text_file, sc.source_of(source.model).input, limit=4, **TEXT)
    call = type(inner.layers[1]).__call__
    monkeypatch.setattr(type(inner.layers[1]), "__call__", lambda self, x, **k: call(self, x * 2, **k))
    with pytest.raises(AnatomyError, match="does more between its blocks"):
        walk_of(source, anatomy, data)


@pytest.mark.parametrize(
    ("text", "size"), [("6GB", 6 * 10**9), ("512 MiB", 2**29), ("1.5g", 1.5e9), (1000, 1000), ("2k", 2000)]
)
def test_sizes(text, size):
    assert parse_bytes(text) == size


def test_the_command_line(secateur, language, text_file, tmp_path):
    command = ("compress", language, "--text", text_file, "--keep-params", 0.8, "--align", 1, "--out", tmp_path / "s")
    command += ("--window", 16, "--limit", 12, "--held-out", 6, "--memory-budget", "6GB")
    done = secateur(*command, "--criterion", "variance")
    assert done.status == 0, done.err
    assert "perplexity per token" in done.out
    assert "runs forward only" in secateur(*command, "--criterion", "amp").error


def test_gradients_of_a_bfloat16_model_with_checkpointing(bf16, text_file):
    model = sc.load_model(bf16)
    options = {"loss": "logits-entropy", "weighting": None, "covariance": False, "batch_size": 1, "limit": 4, **TEXT}
    plain = sc.calibrate(model, text_file, **options)
    again = sc.calibrate(model, text_file, checkpointing=True, **options)
    for name, sums in plain.taylor["logits-entropy"].items():
        assert torch.equal(sums.token, again.taylor["logits-entropy"][name].token)
        assert sums.token.dtype == torch.float32
    assert all(p.grad is None for p in model.parameters())


def test_the_entropy_of_many_logits_is_taken_in_parts(monkeypatch):
    from secateur.calibration import losses as names
    from secateur.calibration.losses import LossInput
    from secateur.models import Features

    logits = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    found = []
    for size in (2**24, 100):
        monkeypatch.setattr(sys.modules["secateur.calibration.losses"], "_PART", size)
        value = names.get("logits-entropy")(LossInput(Features(logits[:, 0], logits=logits)))
        found.append((value.detach(), *torch.autograd.grad(value, logits)))
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole)
