"""Language models: what is found in each architecture, that the cut is exact, and that they still generate."""

from __future__ import annotations

import functools
from collections import Counter

import pytest
import torch

import language_zoo as zoo
import secateur as sc
from secateur.anatomy import Kind, find_anatomy
from secateur.plan import Kept, Plan
from secateur.surgery import mask, prune

EXACT = 2e-5  # of the largest logit: norms and softmax compute in float32 whatever the model does


@functools.cache
def looked_at(name):
    model, x = zoo.make(name)
    return model, x, find_anatomy(model, x, zoo.forward)


def plan_for(groups, share=2 / 3):
    """Keep about so much of each group, unevenly over the layers, at random."""
    kept = {}
    for i, (name, group) in enumerate(groups.items()):
        count = group.at_most(round(share * group.size) - i % 2)
        order = torch.randperm(group.size, generator=torch.Generator().manual_seed(i)).tolist()
        kept[name] = Kept(kind=str(group.kind), size=group.size, keep=tuple(sorted(order[:count])))
    return Plan(groups=kept)


@functools.cache
def cut(name):
    model, _, anatomy = looked_at(name)
    return prune(model, plan_for(anatomy.cuttable), anatomy=anatomy, compensate="none")


def logits(model, x):
    with torch.no_grad():
        return zoo.forward(model, x).logits


def assert_same(a, b, bound=EXACT):
    assert (a - b).abs().max() <= bound * b.abs().max()


@pytest.mark.parametrize("name", zoo.ALL)
def test_all_that_can_be_cut_is_found(name):
    _, _, anatomy = looked_at(name)
    assert Counter(str(g.kind) for g in anatomy.cuttable.values()) == zoo.ALL[name][2]


@pytest.mark.parametrize("name", zoo.ALL)
def test_cutting_every_group_is_masking_it(name):
    model, x, anatomy = looked_at(name)
    plan = plan_for(anatomy.cuttable)
    masked = logits(mask(model, plan, anatomy), x)
    assert_same(logits(cut(name), x), masked)
    assert (logits(model, x) - masked).abs().max() > 1e-3 * masked.abs().max()
    assert sum(p.numel() for p in cut(name).parameters()) == anatomy.params_after(plan.kept())


@pytest.mark.parametrize("name", zoo.ALL)
def test_the_cut_holds_in_every_implementation(name):
    _, x, _ = looked_at(name)
    small = cut(name)
    chosen, padded = logits(small, x), torch.ones_like(x)
    held = small.config._attn_implementation, small.config._experts_implementation
    try:
        small.set_attn_implementation("eager")
        if held[1] != "eager":
            small.set_experts_implementation("eager")
        assert_same(logits(small, x), chosen)
    finally:
        small.set_attn_implementation(held[0])
        if held[1] != "eager":
            small.set_experts_implementation(held[1])
    padded[0, :2] = 0
    with torch.no_grad():
        more = {"decoder_input_ids": x} if small.config.is_encoder_decoder else {}
        assert torch.isfinite(small(input_ids=x, attention_mask=padded, **more).logits[1]).all()


@pytest.mark.parametrize("name", [*zoo.CAUSAL, *zoo.ENCODER_DECODER])
def test_a_cut_model_generates_with_its_cache(name):
    _, x, _ = looked_at(name)
    small = cut(name)
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad():
        out = small.generate(x, attention_mask=torch.ones_like(x), **options)
        start = out.sequences.shape[1] - 4
        if small.config.is_encoder_decoder:
            full = small(input_ids=x, decoder_input_ids=out.sequences, use_cache=False).logits
        else:
            full = small(input_ids=out.sequences, use_cache=False).logits
    assert_same(torch.stack(out.logits, 1), full[:, start - 1 : -1], 1e-4)


def test_experts_are_found_whatever_implementation_runs_them():
    model, x = zoo.make("mixtral")
    for attention, experts in (("eager", "eager"), ("sdpa", "batched_mm")):
        model.set_attn_implementation(attention)
        model.set_experts_implementation(experts)
        anatomy = find_anatomy(model, x, zoo.forward)
        assert Counter(str(g.kind) for g in anatomy.cuttable.values()) == zoo.ALL["mixtral"][2]
        assert (model.config._attn_implementation, model.config._experts_implementation) == (attention, experts)


@pytest.mark.parametrize("name", ["t5", "gpt2"])
def test_tied_embeddings_stay_tied(name):
    model, _, _ = looked_at(name)
    tied = [n for n, _ in model.named_parameters(remove_duplicate=False)]
    once = [n for n, _ in model.named_parameters()]
    assert len(once) < len(tied) and [n for n, _ in cut(name).named_parameters()] == once


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_layers_with_other_numbers_of_heads_share_a_static_cache(name):
    _, x, _ = looked_at(name)
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(x)}
    grown = cut(name).generate(x, **options)
    assert torch.equal(cut(name).generate(x, cache_implementation="static", **options), grown)


@pytest.mark.parametrize("name", ["bloom", "mpt"])
def test_heads_with_slopes_of_their_own_say_so(name):
    _, _, anatomy = looked_at(name)
    reasons = [g.reason for g in anatomy.groups.values() if g.kind is Kind.HEADS]
    assert reasons and all("ALiBi" in r for r in reasons)


def test_a_layer_sees_its_own_number_in_the_shared_config():
    """Phi-3 reads the number of heads from the config at every call."""
    small = cut("phi3")
    counts = [layer.self_attn.config.num_attention_heads for layer in small.model.layers]
    assert [layer.self_attn.qkv_proj.out_features // 8 for layer in small.model.layers] == [
        n + 2 * layer.self_attn.num_key_value_heads for n, layer in zip(counts, small.model.layers, strict=True)
    ]
    assert small.config.num_attention_heads == 6 and max(counts) < 6


@pytest.mark.parametrize("name", ["phi3", "mixtral", "t5"])
def test_a_cut_model_is_saved_and_loaded(name, tmp_path):
    _, x, _ = looked_at(name)
    sc.save(cut(name), tmp_path / "small")
    assert torch.equal(logits(sc.load(tmp_path / "small"), x), logits(cut(name), x))
