"""Whole blocks: removing them, what that costs, choosing them, and putting something cheaper in their place."""

import pytest
import torch

import secateur as sc
from secateur.errors import PlanError
from secateur.plan import Kept, Plan

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
    assert {n: g.fixed for n, g in anatomy.removable.items()} == {
        "encoder.block:blocks": (0,),
        "decoder.block:blocks": (0,),
    }
    plan = Plan(groups={"encoder.block:blocks": Kept(kind="blocks", size=4, keep=(1, 2, 3))})
    with pytest.raises(PlanError, match=r"block 0 of 'encoder.block:blocks' must stay"):
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
