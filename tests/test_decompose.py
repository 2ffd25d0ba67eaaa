"""Rotate, then slice: SliceGPT's residual width and MoDeGPT's head dimensions, on the same Plan as everything else."""

import pytest
import torch

import secateur as sc
from secateur.allocation.modegpt import sparsities
from secateur.anatomy import Kind
from secateur.anatomy.verify import randomise_
from secateur.errors import AnatomyError, DataError
from secateur.nn.narrow import QK, VO
from secateur.nn.stream import read_norm
from secateur.plan import Kept, Plan
from secateur.surgery.rotation.residual import principal_axes
from secateur.surgery.rotation.values import basis

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 96}
GROUPED = {**SIZE, "num_key_value_heads": 2, "head_dim": 8}
HEADS = ("vo_dim", "qk_dim")


def make(name):
    import transformers as t

    if name == "timm":
        model = sc.load_model("timm/test_vit", pretrained=False, img_size=32, num_classes=7)
    elif name == "gpt2":
        model = t.GPT2LMHeadModel(t.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96))
    elif name == "opt":
        config = t.OPTConfig(
            hidden_size=32,
            word_embed_proj_dim=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=48,
            vocab_size=96,
        )
        model = t.OPTForCausalLM(config)
    else:
        kind, *tied = name.split("-")
        config = getattr(t, f"{kind}Config")(**GROUPED, tie_word_embeddings=bool(tied), pad_token_id=0)
        model = getattr(t, f"{kind}ForCausalLM")(config)
    randomise_(model)  # norms whose weights are not all one, biases that are not zero
    return model.eval()


def data_for(model):
    spec = sc.source_of(model).input
    torch.manual_seed(1)
    return torch.randint(3, 96, (8, 16)) if spec is not sc.source_of(model).image else torch.randn(8, 3, *spec.size)


def options(x):
    return {"window": 16} if x.dim() == 2 else {}


def outputs(model, x):
    with torch.no_grad():
        out = model(x)
    return out if isinstance(out, torch.Tensor) else out.logits


def distance(a, b):
    return float((a - b).abs().max() / b.abs().max())


def rotated(model, kinds):
    """Data, the rotated model, its anatomy and statistics."""
    x = data_for(model)
    anatomy = sc.inspect(model)
    stats = sc.calibrate(model, x, anatomy, loss=(), moments=kinds, covariance=False, **options(x))
    turned = sc.rotate(model, stats, kinds)
    return x, turned, sc.inspect(turned)


def some(anatomy, kinds, seed=0):
    """About two thirds of every group of these kinds, drawn at random."""
    torch.manual_seed(seed)
    groups = {}
    for name, group in anatomy.cuttable.items():
        if group.kind in kinds:
            count = max(1, group.size * 2 // 3 // 2 * 2)
            keep = tuple(torch.randperm(group.size)[:count].sort().values.tolist())
            groups[name] = Kept(kind=str(group.kind), size=group.size, keep=keep)
    return Plan(groups=groups)


def check_cut(model, anatomy, plan, x, folder):
    """Sliced equals masked, parameters are as predicted, and it loads bit by bit."""
    small = sc.prune(model, plan, anatomy=anatomy, compensate="none")
    assert distance(outputs(small, x), outputs(sc.mask(model, plan, anatomy), x)) < 1e-5
    assert sc.parameters(small) == anatomy.params_after(plan.kept()) < anatomy.params
    sc.save(small, folder)
    loaded = sc.load(folder)
    assert torch.equal(outputs(loaded, x), outputs(small, x))
    return loaded


def generates(model, x):
    ids = x[:2, :10]
    out = model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=True, pad_token_id=0, eos_token_id=None)
    with torch.no_grad():
        whole = model(out[:, :-1], use_cache=False).logits[:, 9:]
    chosen = whole.gather(-1, out[:, 10:, None])[..., 0]
    torch.testing.assert_close(chosen, whole.amax(-1), rtol=1e-4, atol=1e-4)


# -- the residual width -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["Llama", "Llama-tied", "Qwen2", "Mistral", "Gemma-tied", "gpt2", "opt", "timm"], ids=str
)
def test_the_residual_width(name, tmp_path):
    model = make(name)
    x, turned, anatomy = rotated(model, ("residual",))
    assert distance(outputs(turned, x), outputs(model, x)) < 1e-4
    (group,) = (g for g in anatomy.cuttable.values() if g.kind == Kind.RESIDUAL)
    plan = sc.allocate(
        sc.score(None, "order", model=turned, anatomy=anatomy), 0.7, "uniform", kinds=["residual"], align=2
    )
    kept = plan.groups[group.name].keep
    assert kept == tuple(range(len(kept))) and len(kept) < group.size
    loaded = check_cut(turned, anatomy, plan, x, tmp_path / "small")
    check_cut(turned, anatomy, some(anatomy, ("residual", "hidden")), x, tmp_path / "odd")
    if x.dim() == 2:
        generates(loaded, x)


def test_a_cut_llama_is_a_plain_one(tmp_path):
    """Other software loads it: the same class, a smaller config, nothing but its own parameters."""
    import transformers as t

    model = make("Llama")
    x, turned, anatomy = rotated(model, ("residual",))
    scores = sc.score(None, "order", model=turned, anatomy=anatomy)
    small = sc.prune(turned, sc.allocate(scores, 0.7, "uniform", kinds=["residual"], align=8), compensate="none")
    width = small.model.embed_tokens.embedding_dim
    eps = small.model.norm.variance_epsilon
    plain = t.LlamaForCausalLM(t.LlamaConfig(**{**GROUPED, "hidden_size": width}, rms_norm_eps=eps)).eval()
    plain.load_state_dict(small.state_dict())
    torch.testing.assert_close(outputs(plain, x), outputs(small, x))


def test_a_rotated_model_is_saved_as_it_is(tmp_path):
    model = make("Llama-tied")
    x, turned, anatomy = rotated(model, ("residual",))
    assert turned.lm_head.weight is turned.model.embed_tokens.weight
    assert sc.parameters(turned) == sc.parameters(model) + 32 * 32
    sc.save(turned, tmp_path / "turned")
    loaded = sc.load(tmp_path / "turned")
    assert torch.equal(outputs(loaded, x), outputs(turned, x))
    assert sc.inspect(loaded).cuttable.keys() == anatomy.cuttable.keys()
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_refits_make_up_for_one_rotation_in_all_layers():
    model = make("Llama")
    x, turned, anatomy = rotated(model, ("residual",))
    stats = sc.calibrate(turned, x, anatomy, loss=(), **options(x))
    plan = sc.allocate(sc.score(stats, "order"), 0.8, "uniform", kinds=["residual"], align=2)
    errors = {
        how: distance(outputs(sc.prune(turned, plan, compensate=how, stats=stats), x), outputs(model, x))
        for how in ("none", "ridge", "affine")
    }
    assert max(errors["ridge"], errors["affine"]) < errors["none"]
    front_to_back = sc.prune(turned, plan, compensate="sequential", stats=stats, data=x, **options(x))
    assert distance(outputs(front_to_back, x), outputs(model, x)) < errors["affine"]


def test_principal_axes_keep_the_most():
    torch.manual_seed(0)
    x_TD = torch.randn(200, 6) @ torch.diag(torch.tensor([1.0, 5, 2, 0.1, 3, 0.5])) @ torch.randn(6, 6)
    q_DD = principal_axes(x_TD.T @ x_TD)
    torch.testing.assert_close(q_DD @ q_DD.T, torch.eye(6, dtype=torch.double))
    left = (x_TD.double() @ q_DD)[:, 3:].square().sum()
    assert float(left) == pytest.approx(float(torch.linalg.svdvals(x_TD)[3:].square().sum()), rel=1e-4)


@pytest.mark.parametrize("offset", [0, 1])
def test_norms_are_read_by_trying(offset):
    class Norm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = torch.nn.Parameter(torch.randn(8)), 1e-6

        def forward(self, x):
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (self.weight + offset)

    found = read_norm(Norm(), "", 8)
    assert (found.slope, found.offset, found.eps, found.centred) == (1.0, offset, "eps", False)
    assert read_norm(torch.nn.LayerNorm(8), "", 8).centred
    assert read_norm(torch.nn.Linear(8, 8), "", 8) is None


def test_what_cannot_be_rotated_says_why():
    import transformers as t

    torch.manual_seed(0)
    bert = t.BertForMaskedLM(t.BertConfig(**SIZE)).eval()
    randomise_(bert)
    x = torch.randint(3, 96, (4, 16))
    stats = sc.calibrate(bert, x, loss=(), moments=("residual",), covariance=False, window=16)
    with pytest.raises(AnatomyError, match="norms after the addition"):
        sc.rotate(bert, stats)
    with pytest.raises(DataError, match="cannot be rotated; use residual"):
        sc.rotate(bert, stats, ("hidden",))
    llama = make("Llama")
    with pytest.raises(DataError, match="another model"):
        sc.rotate(llama, stats)
    plain = sc.calibrate(llama, x, loss=(), covariance=False, window=16)
    with pytest.raises(DataError, match="calibrate with moments="):
        sc.rotate(llama, plain)
    refused = [g for g in plain.anatomy.groups.values() if g.kind in ("residual", *HEADS)]
    assert len(refused) == 5 and all("secateur.rotate" in g.reason for g in refused)


# -- dimensions of heads ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Mistral", "Gemma-tied", "opt"], ids=str)
def test_head_dimensions(name, tmp_path):
    model = make(name)
    x, turned, anatomy = rotated(model, HEADS)
    assert distance(outputs(turned, x), outputs(model, x)) < 1e-4
    for kind in HEADS:
        assert sum(g.kind == kind for g in anatomy.cuttable.values()) == 2, kind
    for seed, kinds in enumerate((("qk_dim",), ("vo_dim",), (*HEADS, "hidden", "kv_groups", "heads"))):
        loaded = check_cut(turned, anatomy, some(anatomy, kinds, seed), x, tmp_path / str(seed))
    generates(loaded, x)


def test_every_layer_has_its_own_sizes_and_frequencies():
    model = make("Llama")
    x, turned, anatomy = rotated(model, HEADS)
    names = [n for n, g in anatomy.cuttable.items() if g.kind == "qk_dim"]
    plan = Plan(groups={n: Kept(kind="qk_dim", size=4, keep=k) for n, k in zip(names, ((0, 3), (1,)), strict=True)})
    small = sc.prune(turned, plan, anatomy=anatomy, compensate="none")
    first, second = (layer.self_attn for layer in small.model.layers)
    assert first.rotary_index.tolist() == [0, 3, 4, 7] and second.rotary_index.tolist() == [1, 5]
    assert (getattr(first, QK), getattr(first, VO), getattr(second, QK)) == (4, 8, 2)
    assert first.scaling == model.model.layers[0].self_attn.scaling  # of the dense head
    cache = small(x, use_cache=True).past_key_values
    assert cache.layers[0].keys.shape[-1] == 4 and cache.layers[0].values.shape[-1] == 8


def test_values_are_approximated_best_possible():
    """The error of keeping r dimensions is that of the best rank-r map from inputs to outputs."""
    torch.manual_seed(0)
    x_TN, wv_NV, wo_VD = torch.randn(300, 10), torch.randn(10, 6), torch.randn(6, 12)
    v_TV = (x_TN @ wv_NV).double()
    a_VV, inverse_VV = basis(v_TV.T @ v_TV, wo_VD.double()[None])
    torch.testing.assert_close(a_VV @ inverse_VV, torch.eye(6, dtype=torch.double))
    y_TD = v_TV @ wo_VD.double()
    for rank in (2, 4):
        kept = v_TV @ a_VV[:, :rank] @ inverse_VV[:rank] @ wo_VD.double()
        best = torch.linalg.svdvals(y_TD)[rank:].square().sum()
        torch.testing.assert_close((y_TD - kept).square().sum(), best)


def test_modegpt_from_end_to_end():
    model = make("Llama")
    x, turned, anatomy = rotated(model, HEADS)
    stats = sc.calibrate(turned, x, anatomy, loss=(), **options(x))
    scores = sc.score(stats, "modegpt")
    qk, vo, hidden = (next(g for g in anatomy.cuttable.values() if g.kind == k) for k in ("qk_dim", "vo_dim", "hidden"))
    torch.testing.assert_close(scores.values[hidden.name], sc.score(stats, "leverage").values[hidden.name])
    assert scores.values[vo.name].argsort(descending=True).tolist() == list(range(8))
    with torch.no_grad():
        attention = turned.model.layers[0].self_attn
        h = turned.model.layers[0].input_layernorm(turned.model.embed_tokens(x))
        q, k = (p(h).unflatten(-1, (-1, 8)).square().sum((0, 1)) for p in (attention.q_proj, attention.k_proj))
    q, k = q[:, :4] + q[:, 4:], (k[:, :4] + k[:, 4:]).repeat_interleave(2, 0)
    torch.testing.assert_close(scores.values[qk.name], (q * k).sqrt().sum(0), rtol=1e-4, atol=1e-4)
    plan = sc.allocate(scores, 0.8, "modegpt", kinds=["hidden", *HEADS], align=1, eps=0.5)
    small = sc.prune(turned, plan, stats=stats, compensate="ridge")
    assert sc.parameters(small) == plan.predicted["params"] <= 0.8 * sc.parameters(model)
    turns = stats.stream.influence()
    most, least = int(turns.argmax()), int(turns.argmin())
    counts = [plan.kept()[n] for n, g in anatomy.cuttable.items() if g.kind == "hidden"]
    assert counts[most] >= counts[least]


def test_ridge_is_the_nystrom_form_of_modegpt():
    """W2' = (C_KK)^-1 C_K: W2 over all rows is W_K plus the regression of what goes, once the ridge is small."""
    from secateur.surgery.compensate.ridge import fold, regression

    torch.manual_seed(0)
    h_TN = torch.randn(400, 9, dtype=torch.double) @ torch.randn(9, 9, dtype=torch.double)
    moment, weight = h_TN.T @ h_TN, torch.randn(9, 5, 1, dtype=torch.double)
    alive = torch.tensor([1, 1, 0, 1, 0, 1, 1, 0, 1], dtype=torch.bool)
    ours = fold(weight, alive, regression(moment, alive, 1e-9))[alive][..., 0]
    published = torch.linalg.solve(moment[alive][:, alive], moment[alive] @ weight[..., 0])
    torch.testing.assert_close(ours, published, rtol=1e-5, atol=1e-5)


def test_sparsities_are_capped_and_shared_out():
    weights = torch.softmax(-torch.tensor([0.9, 0.3, 0.05, 0.02], dtype=torch.double) / 0.1, 0)
    phi = sparsities(weights, 0.4, 0.8)
    assert float(phi.mean()) == pytest.approx(0.4) and float(phi.max()) == pytest.approx(0.8)
    assert phi.tolist() == sorted(phi.tolist())
    free = sparsities(weights, 0.01, 0.8)
    torch.testing.assert_close(free, 4 * 0.01 * weights)
    assert sparsities(weights, 1.0, 0.5).tolist() == [0.5] * 4


def test_the_command_line(secateur, language, text_file, tmp_path):
    stats, turned, again, plan, small = (
        tmp_path / n for n in ("s.safetensors", "turned", "t.safetensors", "p.json", "small")
    )
    text = ("--text", text_file, "--window", 16, "--limit", 12, "--loss", "none")

    def run(*arguments):
        done = secateur(*arguments)
        assert done.status == 0, done.err
        return done.out

    run("calibrate", language, *text, "--moments", "residual,vo_dim", "--out", stats)
    out = run("rotate", language, "--statistics", stats, "--kinds", "residual,vo_dim,qk_dim", "--out", turned)
    assert "no parameters added" in out  # its norms have no weights but ones
    run("calibrate", turned, *text, "--out", again)
    chosen = ("--criterion", "modegpt", "--allocator", "modegpt", "--align", 1, "--keep-params", 0.8)
    run("plan", turned, "--statistics", again, *chosen, "--kinds", "residual,vo_dim,qk_dim,hidden", "--out", plan)
    run("prune", turned, "--plan", plan, "--statistics", again, "--compensate", "ridge", "--out", small)
    ids = torch.randint(3, 96, (2, 12))
    assert torch.isfinite(outputs(sc.load(small), ids)).all()
    with pytest.raises(AssertionError, match="cannot be rotated; use"):
        run("rotate", language, "--statistics", stats, "--kinds", "heads", "--out", turned)
