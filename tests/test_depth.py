"""Whole blocks: removing them, what that costs, choosing them, and putting something cheaper in their place."""

import subprocess
import sys

import pytest
import torch

import secateur as sc
from secateur.errors import ArtifactError, BudgetError, PlanError
from secateur.plan import Kept, Plan
from secateur.surgery import plan_of

TEXT = {"window": 16}
SIZE = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 96, "max_position_embeddings": 64}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def llama(layers=5):
    import transformers as t

    return t.LlamaForCausalLM(t.LlamaConfig(**SIZE, **HEADS, num_hidden_layers=layers))


def gemma3():
    """Sliding windows of 8 tokens in every other layer."""
    import transformers as t

    types = ["sliding_attention", "full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    return t.Gemma3ForCausalLM(
        t.Gemma3TextConfig(**SIZE, **HEADS, num_hidden_layers=5, head_dim=8, sliding_window=8, layer_types=types)
    )


def gpt2():
    import transformers as t

    size = {"n_embd": 32, "n_layer": 5, "n_head": 4, "vocab_size": 96, "n_positions": 64}
    return t.GPT2LMHeadModel(t.GPT2Config(**size, bos_token_id=0, eos_token_id=1))


def t5():
    import transformers as t

    size = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "vocab_size": 96}
    return t.T5ForConditionalGeneration(
        t.T5Config(**size, num_layers=4, num_decoder_layers=4, decoder_start_token_id=0)
    )


def bert():
    import transformers as t

    return t.BertModel(t.BertConfig(**SIZE, num_attention_heads=4, num_hidden_layers=4))


def dinov2():
    import transformers as t

    size = {"hidden_size": 32, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
    return t.Dinov2Model(t.Dinov2Config(**size, num_hidden_layers=4))


def timm(name, **options):
    return lambda: sc.load_model(f"timm/{name}", pretrained=False, num_classes=5, **options)


MODELS = {
    "llama": llama,
    "gemma3": gemma3,
    "gpt2": gpt2,
    "t5": t5,
    "bert": bert,
    "dinov2": dinov2,
    "timm vit": timm("test_vit", img_size=32),
    "swin": timm("swin_tiny_patch4_window7_224", img_size=56, embed_dim=16, depths=(2, 3), num_heads=(2, 4)),
    "convnext": timm("test_convnext"),
}
GENERATE = ("llama", "gemma3", "gpt2", "t5")


def made(name, seed=0):
    """A model whose blocks all do something."""
    torch.manual_seed(seed)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(0, p[0].numel() ** -0.5)
            elif p.unique().numel() == 1 and float(p[0]) < 1e-2:
                p.fill_(0.5)  # LayerScale; biases as well
    return model, sc.inspect(model)


def plan_for(anatomy, width=False):
    """Every other block that can go goes; with `width`, a third of the units of all other groups as well."""
    groups = {}
    for name, group in anatomy.removable.items():
        gone = [i for i in range(group.size) if i not in group.fixed][::2]
        groups[name] = tuple(i for i in range(group.size) if i not in gone)
    for name, group in anatomy.cuttable.items() if width else ():
        groups[name] = tuple(range(group.size))[: -(-2 * group.size // 3)]
    kept = {n: Kept(kind=str(anatomy.groups[n].kind), size=anatomy.groups[n].size, keep=k) for n, k in groups.items()}
    return Plan(groups=kept)


def run(model):
    with torch.no_grad():
        return sc.models.features(model, sc.models.example_input(model)).embedding


@pytest.mark.parametrize("width", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_sliced_is_masked_and_costs_are_exact(name, width):
    model, anatomy = made(name)
    assert anatomy.removable
    plan = plan_for(anatomy, width)
    dense, masked = run(model), run(sc.mask(model, plan, anatomy))
    small = sc.prune(model, plan, compensate="none", anatomy=anatomy)
    assert torch.equal(run(model), dense)
    assert not torch.allclose(dense, masked, rtol=1e-3)
    torch.testing.assert_close(run(small), masked, rtol=1e-5, atol=1e-5 * float(masked.abs().max()))
    kept = {n: g.keep for n, g in plan.groups.items()}
    assert anatomy.params_after(kept) == sc.parameters(small) < sc.parameters(model)
    assert anatomy.macs_after(kept) == pytest.approx(sc.macs(small))


@pytest.mark.parametrize("name", GENERATE)
def test_generation_with_a_cache_gives_what_the_whole_sequence_gives(name):
    model, anatomy = made(name)
    assert_generates(sc.prune(model, plan_for(anatomy, True), compensate="none", anatomy=anatomy))


def assert_generates(model):
    ids = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached = model.generate(ids, use_cache=True, **options)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))


def test_layers_keep_their_types():
    model, anatomy = made("gemma3")
    small = sc.prune(model, Plan(groups={"model.layers:blocks": Kept(kind="blocks", size=5, keep=(1, 3, 4))}),
                     compensate="none", anatomy=anatomy)  # fmt: skip
    assert small.config.layer_types == ["full_attention", "full_attention", "sliding_attention"]
    assert [x.self_attn.layer_idx for x in small.model.layers] == [0, 1, 2]
    assert small.config.num_hidden_layers == 3
    assert model.config.num_hidden_layers == 5


def test_the_block_that_owns_the_position_table_must_stay():
    model, anatomy = made("t5")
    assert {n: list(g.fixed) for n, g in anatomy.removable.items()} == {
        "encoder.block:blocks": [0],
        "decoder.block:blocks": [0],
    }
    plan = Plan(groups={"encoder.block:blocks": Kept(kind="blocks", size=4, keep=(1, 2, 3))})
    with pytest.raises(PlanError, match=r"block 0 of 'encoder.block:blocks' must stay: it makes something beside"):
        sc.prune(model, plan, anatomy=anatomy, compensate="none")


def test_blocks_are_not_cut_unless_asked_for():
    _, anatomy = made("llama")
    assert "blocks" not in {str(g.kind) for g in anatomy.cuttable.values()}
    scores = sc.score(None, "magnitude", model=made("llama")[0], anatomy=anatomy)
    assert set(scores.values) == set(anatomy.cuttable)


class Features(torch.nn.Module):
    """Hands out what its second block made as well."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU()) for _ in range(4))

    def forward(self, x):
        found = []
        for i, block in enumerate(self.blocks):
            x = x + block(x)
            if i == 1:
                found.append(x)
        return torch.cat([*found, x])


def test_blocks_that_are_added_outside_are_refused_with_a_reason():
    anatomy = sc.inspect(Features(), torch.randn(2, 5, 8))
    assert not anatomy.removable
    assert [g.reason for g in anatomy.groups.values() if g.kind == "blocks"]


SCORED = {"block-influence": "cosine", "angular": "angle"}


@pytest.fixture(scope="module")
def language_model(language):
    """The tiny LLaMA, with five blocks that differ in how much they do."""
    import transformers as t

    folder = language.parent / "llama-5"
    torch.manual_seed(0)
    model = t.LlamaForCausalLM(t.LlamaConfig(**SIZE, **HEADS, num_hidden_layers=5))
    with torch.no_grad():
        for block, scale in zip(model.model.layers, (1, 0.3, 0.02, 0.05, 0.8), strict=True):
            for p in (block.mlp.down_proj.weight, block.self_attn.o_proj.weight):
                p.normal_(0, scale * p.shape[1] ** -0.5)
    model.save_pretrained(folder)
    for file in language.glob("token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture(scope="module")
def calibrated(language_model, text_file):
    model = sc.load_model(language_model)
    return model, sc.calibrate(model, text_file, loss=(), covariance=False, limit=16, **TEXT)


@pytest.mark.parametrize("criterion", SCORED)
def test_scores_of_blocks(calibrated, criterion):
    _, statistics = calibrated
    scores = sc.score(statistics, criterion)
    assert set(scores.values) == set(scores.between) == {"model.layers:blocks"}
    expected = statistics.stream.influence(angular=criterion == "angular")
    torch.testing.assert_close(scores.values["model.layers:blocks"], expected)
    assert scores.values["model.layers:blocks"].argsort()[:2].tolist() == [2, 3]
    two = statistics.stream.influence(2, angular=criterion == "angular")
    torch.testing.assert_close(scores.between["model.layers:blocks"].diagonal(2), two)


@pytest.mark.parametrize("allocator", ["uniform", "global", "contiguous"])
def test_allocators_choose_blocks_within_the_budget(calibrated, allocator, tmp_path):
    model, statistics = calibrated
    scores = sc.score(statistics, "angular")
    scores.save(tmp_path / "scores.safetensors")
    scores = sc.Scores.load(tmp_path / "scores.safetensors")
    plan = sc.allocate(scores, 0.7, allocator, anatomy=sc.inspect(model))
    keep = plan.groups["model.layers:blocks"].keep
    assert not {2, 3} & set(keep)
    small = sc.prune(model, plan, compensate="none")
    assert sc.parameters(small) == plan.predicted["params"] <= 0.7 * sc.parameters(model)
    if allocator == "contiguous":
        gone = sorted(set(range(5)) - set(keep))
        assert gone == list(range(gone[0], gone[0] + len(gone)))


def test_methods_that_do_not_fit_are_refused(calibrated, language_model, text_file):
    _, statistics = calibrated
    with pytest.raises(BudgetError, match=r"cannot choose among whole blocks; use one of contiguous, global, uniform"):
        sc.allocate(sc.score(statistics, "angular"), 0.7, "curve")
    with pytest.raises(BudgetError, match="'obs' scores no whole blocks: use block-influence or angular"):
        sc.compress(language_model, text_file, keep_params=0.7, kinds=("blocks",), criterion="obs", **TEXT)


@pytest.mark.parametrize("compensator", ["none", "sequential"])
def test_compress(language_model, text_file, tmp_path, compensator):
    options = {"kinds": ("blocks",), "compensator": compensator, "limit": 16, "held_out": 8, "measure": False}
    result = sc.compress(language_model, text_file, keep_params=0.7, out=tmp_path / "small", **options, **TEXT)
    assert set(result.plan.groups) == {"model.layers:blocks"}
    assert result.settings.criterion == "block-influence"
    loaded = sc.load(tmp_path / "small")
    ids = torch.randint(3, 96, (2, 12))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, result.model(ids).logits)
    assert_generates(loaded)


def test_what_stays_makes_up_for_blocks(calibrated, text_file):
    model, statistics = calibrated
    plan = sc.allocate(sc.score(statistics, "angular"), 0.6, "contiguous")
    held_out = sc.batches(text_file, sc.source_of(model).input, limit=8, seed=7, **TEXT)
    kl = {}
    for compensator in ("none", "sequential"):
        small = sc.prune(model, plan, compensate=compensator, stats=statistics, data=text_file, limit=64, **TEXT)
        kl[compensator] = sc.fidelity(small, model, held_out).kl
    assert kl["sequential"] < 0.8 * kl["none"]


FRESH = """
import sys, torch, secateur as sc
from secateur._compat import ensure_torchvision
ensure_torchvision()
torch.set_num_threads(1)
ids = torch.load(sys.argv[1])
for folder in sys.argv[2:]:
    torch.save(sc.load(folder)(ids).logits, folder + ".out")
"""


def test_saved_and_loaded_in_a_fresh_process(calibrated, text_file, tmp_path):
    model, _ = calibrated
    anatomy = sc.inspect(model)
    widths = {n: k for n, k in plan_for(anatomy, True).groups.items() if "blocks" not in n}
    narrow = sc.prune(model, Plan(groups=widths), compensate="none", anatomy=anatomy)
    options = {"limit": 16, "steps": 3, **TEXT}
    small = {
        "blocks": sc.prune(model, plan_for(anatomy, True), compensate="none", anatomy=anatomy),
        "linear": sc.shorten(model, 1, 3, text_file, **options),
        "mlp": sc.shorten(narrow, 0, 2, text_file, how="mlp", **options),
        "two runs": sc.shorten(sc.shorten(model, 3, 4, text_file, **options), 0, 2, text_file, **options),
    }
    assert plan_of(small["two runs"]).groups["model.layers:blocks"].keep == (2, 4)
    ids = torch.randint(3, 96, (2, 12))
    torch.save(ids, tmp_path / "ids")
    folders = [str(sc.save(m, tmp_path / name)) for name, m in small.items()]
    command = [sys.executable, "-c", FRESH, str(tmp_path / "ids"), *folders]
    subprocess.run(command, check=True, capture_output=True)
    for name, cut in small.items():
        with torch.no_grad():
            assert torch.equal(torch.load(tmp_path / f"{name}.out"), cut(ids).logits), name
        assert_generates(sc.load(tmp_path / name))


def test_a_damaged_recipe_is_refused(calibrated, tmp_path):
    model, _ = calibrated
    anatomy = sc.inspect(model)
    folder = sc.save(sc.prune(model, plan_for(anatomy), compensate="none", anatomy=anatomy), tmp_path / "small")
    file = folder / "secateur.json"
    whole = file.read_text()
    for before, after in (('"config.num_hidden_layers"', '"forward"'), ('"config.num_hidden_layers"', '"_modules"')):
        assert before in whole
        file.write_text(whole.replace(before, after))
        with pytest.raises(ArtifactError, match=r"is no count|is private"):
            sc.load(folder)


@pytest.mark.parametrize("name", GENERATE)
def test_a_replaced_run_counts_in_the_cache(name):
    """Also at the very front, where models read a cache's length."""
    model, anatomy = made(name)
    stack = next(n for n in anatomy.removable if "encoder" not in n)
    first = len(anatomy.groups[stack].fixed)
    ids = torch.randint(3, 96, (8, 16), generator=torch.Generator().manual_seed(1))
    small = sc.shorten(model, first, first + 2, ids, stack=stack, anatomy=anatomy, **TEXT)
    assert len(small.get_submodule(anatomy.groups[stack].owner)) == anatomy.groups[stack].size - 1
    assert_generates(small)


def test_the_linear_replacement_is_the_regression(calibrated, text_file):
    """It leads closer to the dense stream than handing the stream on."""
    from secateur.surgery.shorten import streams

    model, _ = calibrated
    held_out = sc.batches(text_file, sc.source_of(model).input, limit=8, seed=7, **TEXT)
    small = sc.shorten(model, 1, 4, text_file, limit=128, **TEXT)
    x, y = next(streams(model, "model.layers.1", "model.layers.3", held_out))
    out = small.model.layers[1](x).detach()
    assert float((out - y).square().mean()) < 0.7 * float((x - y).square().mean())


def test_training_never_ends_worse_than_it_began(calibrated, text_file):
    """On the fifth of the data that it holds out."""
    from secateur.surgery.shorten import relative, streams

    model, _ = calibrated
    data = sc.batches(text_file, sc.source_of(model).input, limit=32, **TEXT)
    held_out = list(streams(model, "model.layers.1", "model.layers.2", data))[-1]
    errors = {}
    for how, steps in (("linear", 0), ("mlp", 40)):
        block = sc.shorten(model, 1, 3, text_file, how=how, steps=steps, limit=32, **TEXT).model.layers[1]
        x, y = held_out
        out = block(x).detach()
        error = ((out - y).square().mean(-1) * relative(y)).mean()
        errors[how] = float(error + 1 - torch.nn.functional.cosine_similarity(out, y, dim=-1).mean())
    assert errors["mlp"] <= errors["linear"] + 1e-6


def test_a_run_that_cannot_go_is_refused(calibrated, text_file):
    model, _ = calibrated
    with pytest.raises(PlanError, match=r"has blocks 0 to 4, one of which stays; found 0:5"):
        sc.shorten(model, 0, 5, text_file, **TEXT)
    t5_model, anatomy = made("t5")
    with pytest.raises(PlanError, match="name the one stack"):
        sc.shorten(t5_model, 1, 3, torch.ones(4, 8, dtype=torch.long), anatomy=anatomy)
    with pytest.raises(PlanError, match=r"block 0 of 'encoder.block:blocks' must stay"):
        sc.shorten(t5_model, 0, 2, torch.ones(4, 8, dtype=torch.long), anatomy=anatomy, stack="encoder.block:blocks")


def test_the_command_line(secateur, language_model, text_file, tmp_path):
    wanted = ("--text", text_file, "--keep-params", 0.8, "--kinds", "blocks", "--window", 16, "--limit", 12)
    done = secateur("compress", language_model, *wanted, "--out", tmp_path / "small")
    assert done.status == 0, done.err
    assert "model.layers:blocks" in done.out
    assert "Can be removed whole, with --kinds blocks" in secateur("inspect", language_model).out
    error = secateur("compress", language_model, *wanted, "--criterion", "obs", "--out", tmp_path / "other").error
    assert "'obs' scores no whole blocks" in error
