"""The criteria and allocators of language models against their formulas, by brute force."""

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.allocation.base import Problem
from secateur.anatomy import find_anatomy
from secateur.calibration import WeightSums
from secateur.errors import BudgetError, DataError
from secateur.models import features

LOSSES = ("logits-entropy", "cross-entropy", "kl")


@pytest.fixture(scope="module")
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 96}
    model = LlamaForCausalLM(LlamaConfig(**size, num_attention_heads=4, max_position_embeddings=32)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(0, p.shape[1] ** -0.5)
    return model


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 96, (6, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def statistics(llama, ids):
    options = {"loss": LOSSES, "weights": ("cross-entropy", "kl"), "projected": True, "batch_size": 3}
    return sc.calibrate(llama, ids, **options)


MLP = "model.layers.1.mlp"


def gradients(model, ids, loss):
    """Weight gradients of one layer's MLP, per example, from autograd."""
    found = {n: [] for n in ("gate_proj", "up_proj", "down_proj")}
    for one in ids.split(1):
        model.zero_grad()
        loss(model, one).backward()
        for name, held in found.items():
            held.append(model.get_submodule(f"{MLP}.{name}").weight.grad.clone())
    model.zero_grad()
    return {n: torch.stack(g) for n, g in found.items()}


def cross_entropy(model, ids):
    logits = features(model, ids).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


def test_weight_sums_are_those_of_autograd(llama, ids, statistics):
    found = gradients(llama, ids, cross_entropy)
    for name, rows in (("gate_proj", 1), ("down_proj", 0)):
        weight = llama.get_submodule(f"{MLP}.{name}").weight.detach()
        s = found[name] * weight  # [example, out, in]
        s = s if rows else s.transpose(1, 2)
        batches = s.split(3)
        expected = WeightSums(
            vector=s.sum((0, 2)),
            first=sum(b.sum(0).abs().sum(1) for b in batches),
            second=s.square().sum((0, 2)),
            mixed=sum((b.sum(0) - 0.5 * b.square().sum(0)).abs().sum(1) for b in batches),
        )
        held = statistics.weights["cross-entropy"][f"{MLP}:hidden@{MLP}.{name}.weight"]
        for field, value in vars(expected).items():
            torch.testing.assert_close(getattr(held, field), value, rtol=1e-3, atol=1e-6)


def test_the_joint_saliency_adds_element_by_element(llama, ids, statistics):
    found = gradients(llama, ids, cross_entropy)
    layers = {n: llama.get_submodule(f"{MLP}.{n}").weight.detach() for n in found}
    joint = sum(found[n] * layers[n] for n in ("gate_proj", "up_proj"))
    joint = joint + (found["down_proj"] * layers["down_proj"]).transpose(1, 2)
    expected = joint.abs().mean(2).sum(0)
    torch.testing.assert_close(statistics.joint["cross-entropy"][f"{MLP}:hidden"], expected, rtol=1e-3, atol=1e-6)


def test_no_gradient_is_left_on_a_weight(llama, statistics):
    assert all(p.grad is None and p.requires_grad for p in llama.parameters())


def test_llm_pruner_reduces_over_a_groups_layers(statistics):
    name = f"{MLP}:hidden"
    held = statistics.weights["cross-entropy"]
    first = torch.stack([held[f"{name}@{MLP}.{n}_proj.weight"].first for n in ("gate", "up", "down")])
    expected = {"sum": first.sum(0), "max": first.amax(0), "prod": first.prod(0), "last": first[2], "first": first[0]}
    for reduce, value in expected.items():
        torch.testing.assert_close(sc.score(statistics, "llm-pruner", reduce=reduce).values[name], value)
    vector = sc.score(statistics, "llm-pruner", form="vector", reduce="last").values[name]
    torch.testing.assert_close(vector, held[f"{name}@{MLP}.down_proj.weight"].vector.abs())
    with pytest.raises(DataError, match="form 'third'"):
        sc.score(statistics, "llm-pruner", form="third")


def test_sdmprune_is_the_joint_saliency(statistics):
    scores = sc.score(statistics, "sdmprune").values
    torch.testing.assert_close(scores[f"{MLP}:hidden"], statistics.joint["kl"][f"{MLP}:hidden"])
    assert float(scores[f"{MLP}:hidden"].sum()) > 0
    assert scores["model.layers.1.self_attn:heads"].shape == (4,)


def test_hfprune_is_the_entropy_gradient_per_token(statistics):
    name = f"{MLP}:hidden"
    held = statistics.taylor["logits-entropy"][f"{name}@{MLP}.down_proj"].token
    assert torch.equal(sc.score(statistics, "hfprune").values[name], held)


def seen(llama, ids, path):
    """Inputs of a layer, [T, N]."""
    held = []
    handle = llama.get_submodule(path).register_forward_hook(lambda _m, args, _o: held.append(args[0]))
    with torch.no_grad():
        features(llama, ids)
    handle.remove()
    return held[0].flatten(0, 1)


def test_amp_llm_projects_heads_and_weighs_neurons(llama, ids, statistics):
    h, layer = seen(llama, ids, "model.layers.1.self_attn.o_proj"), llama.model.layers[1].self_attn.o_proj
    heads = [(h[:, k : k + 8] @ layer.weight[:, k : k + 8].T).abs().sum(1).mean() for k in range(0, 32, 8)]
    scores = sc.score(statistics, "amp-llm").values
    torch.testing.assert_close(scores["model.layers.1.self_attn:heads"], torch.stack(heads), rtol=1e-3, atol=1e-5)
    h, layer = seen(llama, ids, f"{MLP}.down_proj"), llama.get_submodule(f"{MLP}.down_proj")
    released = h.abs().mean(0)
    torch.testing.assert_close(
        sc.score(statistics, "amp-llm", neurons="released").values[f"{MLP}:hidden"], released, rtol=1e-3, atol=1e-5
    )
    weighted = released * layer.weight.abs().sum(0)
    torch.testing.assert_close(scores[f"{MLP}:hidden"], weighted.detach(), rtol=1e-3, atol=1e-5)


def test_cfsp_is_no_mere_norm(llama, ids, statistics):
    norm = seen(llama, ids, f"{MLP}.down_proj").square().mean(0).sqrt()
    name = f"{MLP}:hidden"
    torch.testing.assert_close(sc.score(statistics, "cfsp", norm="released").values[name], norm, rtol=1e-3, atol=1e-6)
    down, up, gate = (llama.get_submodule(f"{MLP}.{n}_proj").weight.detach().abs() for n in ("down", "up", "gate"))
    strength = down * norm
    terms = (strength / strength.sum(1, keepdim=True)).mean(0)
    terms = terms + sum((w / w.sum(0, keepdim=True)).mean(1) for w in (up, gate))
    torch.testing.assert_close(sc.score(statistics, "cfsp").values[name], terms * norm, rtol=1e-3, atol=1e-7)


def test_flap_standardises_within_the_layer(llama, ids, statistics):
    scores = sc.score(statistics, "flap").values
    h, layer = seen(llama, ids, f"{MLP}.down_proj"), llama.get_submodule(f"{MLP}.down_proj")
    raw = h.var(0, correction=0) * layer.weight.detach().square().sum(0)
    torch.testing.assert_close(scores[f"{MLP}:hidden"], (raw - raw.mean()) / raw.std(), rtol=1e-2, atol=1e-3)
    h, layer = seen(llama, ids, "model.layers.1.self_attn.o_proj"), llama.model.layers[1].self_attn.o_proj
    raw = (h.var(0, correction=0) * layer.weight.detach().square().sum(0)).square()
    heads = ((raw - raw.mean()) / raw.std()).reshape(4, 8).mean(1)
    torch.testing.assert_close(scores["model.layers.1.self_attn:heads"], heads, rtol=1e-2, atol=1e-3)


def test_the_flap_allocator_keeps_the_best_scores_of_all_layers(statistics):
    scores = sc.score(statistics, "flap")
    plan = sc.allocate(scores, 0.7, "flap", align=1, floor=0.01)
    kept, gone = [], []
    for name, group in plan.groups.items():
        values = scores.values[name]
        inside = torch.zeros(group.size, dtype=torch.bool)
        inside[list(group.keep)] = True
        kept.append(values[inside])
        gone.append(values[~inside] if len(group.keep) > 1 else values[:0])
    assert float(torch.cat(gone).max()) < float(torch.cat(kept).min()) + 1e-6


def test_the_cfsp_allocator_keeps_more_where_the_stream_turns_more(statistics):
    scores = sc.score(statistics, "variance")
    scores.blocks = torch.tensor([[0.0, 0.30], [0.0, 0.10], [0.0, 0.20]])
    plan = sc.allocate(scores, 0.8, "cfsp", align=1, kinds=["hidden"])
    shares = [len(plan.groups[f"model.layers.{i}.mlp:hidden"].keep) / 48 for i in range(3)]
    assert shares[0] > shares[2] > shares[1]
    scores.blocks = torch.empty(0)
    with pytest.raises(BudgetError, match="how much every block turns the stream"):
        sc.allocate(scores, 0.8, "cfsp")


def test_scores_keep_the_blocks_importance(statistics, tmp_path):
    scores = sc.score(statistics, "variance")
    assert torch.equal(scores.blocks[:, 1], statistics.stream.influence(angular=True))
    scores.save(tmp_path / "scores.safetensors")
    assert torch.equal(sc.Scores.load(tmp_path / "scores.safetensors").blocks, scores.blocks)
    statistics.save(tmp_path / "stats.safetensors")
    again = sc.Statistics.load(tmp_path / "stats.safetensors")
    for name, tensor in statistics.tensors().items():
        assert torch.equal(again.tensors()[name], tensor), name


def test_what_was_not_collected_is_named(llama, ids):
    statistics = sc.calibrate(llama, ids, loss=("cross-entropy", "kl"))
    with pytest.raises(DataError, match=r"weights='cross-entropy' \(linear layers only\)"):
        sc.score(statistics, "llm-pruner")
    with pytest.raises(DataError, match="projected=True"):
        sc.score(statistics, "amp-llm")
    with pytest.raises(DataError, match="weights= names loss 'kl', which is not run"):
        sc.calibrate(llama, ids, loss="features", weights="kl")


def test_compress_collects_what_a_criterion_needs(llama, ids):
    for criterion in ("sdmprune", "llm-pruner", "amp-llm"):
        result = sc.compress(
            llama, ids, keep_params=0.9, criterion=criterion, allocator="uniform", compensator="mean", align=1
        )
        assert result.fidelity.perplexity > 0


def test_two_groups_of_one_axis_are_searched_together():
    """Query heads within key/value groups: what amp-bisect settles for one is still whole for the other."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 96}
    model = LlamaForCausalLM(LlamaConfig(**size, num_attention_heads=4, num_key_value_heads=2)).eval()
    tokens = torch.randint(0, 96, (8, 16))
    anatomy = find_anatomy(model, tokens[:2], lambda m, x: m(input_ids=x, use_cache=False))
    scores = sc.score(None, "random", model=model, anatomy=anatomy)
    data = sc.batches(tokens, sc.source_of(model).input, size=8)
    plan = sc.allocate(scores, 0.8, "amp-bisect", anatomy=anatomy, model=model, data=data, align=1, rounds=2, steps=2)
    assert Problem(scores, anatomy, "params", 0).cost({n: len(k.keep) for n, k in plan.groups.items()}) <= (
        0.8 * anatomy.params
    )


def test_the_curve_of_a_language_model_is_scaled_by_its_gradients(llama, ids):
    """Twice the weight of a consumer, half its gradient: the expected rise of the loss is the same."""
    name = f"{MLP}:hidden"
    curves = []
    for losses in ("features", ()):
        statistics = sc.calibrate(llama, ids, loss=losses)
        curves.append((sc.score(statistics, "variance").curves[name], statistics.layers[f"{MLP}.down_proj"]))
    (scaled, sums), (relative, plain) = curves
    assert plain.sensitivity is None
    assert float(scaled[0]) == pytest.approx(
        output_error(llama, sums) * float(sums.energy.sum() / sums.count), rel=1e-2
    )
    assert float(relative[0]) == pytest.approx(plain.stream_share, rel=1e-2)


def output_error(llama, sums):
    """With no unit left: the variance of the output."""
    weight = llama.get_submodule(f"{MLP}.down_proj").weight.detach().double().T
    return float((weight * (sums.covariance @ weight)).sum())
