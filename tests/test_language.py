"""The main job on a language model: calibrate on text, cut, refit, measure, save, load, generate."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

import secateur as sc
from secateur.errors import DataError, SecateurWarning, SourceError

TEXT = {"window": 16}


@pytest.fixture(scope="module")
def llama(language):
    return sc.load_model(language)


@pytest.fixture(scope="module")
def anatomy(llama):
    return sc.inspect(llama)


@pytest.fixture(scope="module")
def statistics(llama, anatomy, text_file):
    losses = ("features", "logits-entropy", "cross-entropy", "kl")
    return sc.calibrate(llama, text_file, anatomy, loss=losses, limit=24, **TEXT)


def test_what_can_be_cut(anatomy):
    kinds = {str(g.kind) for g in anatomy.cuttable.values()}
    assert kinds == {"hidden", "heads", "kv_groups"}
    assert len(anatomy.blocks) == 3


def test_perplexity_is_the_mean_loss_per_token(llama, text_file):
    data = sc.batches(text_file, sc.source_of(llama).input, limit=10, **TEXT)
    losses = [F.cross_entropy(llama(b).logits[:, :-1].flatten(0, 1), b[:, 1:].flatten(), reduction="sum") for b in data]
    found = sc.perplexity(llama, data)
    assert found.token == pytest.approx(math.exp(float(sum(losses)) / 150), rel=1e-5)
    assert (found.tokens, found.windows, found.window, found.stride) == (150, 10, 16, 16)
    assert found.word == pytest.approx(found.token)  # every token of this tokenizer is a word
    assert sc.perplexity(llama, data, stride=4).tokens == 40


def test_perplexity_needs_text(vit, llama):
    images = sc.batches(torch.randn(4, 3, 64, 64), sc.source_of(vit).input)
    with pytest.raises(DataError, match="perplexity is of text"):
        sc.perplexity(vit, images)


def test_taylor_sums_of_a_language_model(llama, statistics, text_file):
    """Entropy-Taylor at the down projection against autograd with an explicit gate."""
    data = sc.batches(text_file, sc.source_of(llama).input, limit=24, **TEXT)
    path = "model.layers.1.mlp.down_proj"
    expected = 0
    for batch in data:
        held = []

        def gate(_module, args, held=held):
            held.append(args[0].detach().requires_grad_(True))
            return (held[0],)

        handle = llama.get_submodule(path).register_forward_pre_hook(gate)
        log_p = llama(batch).logits.log_softmax(-1)
        handle.remove()
        (gradient,) = torch.autograd.grad(-(log_p.exp() * log_p).sum(), held)
        expected = expected + (held[0] * gradient).abs().sum((0, 1)).detach()
    (name,) = (n for n in statistics.taylor["logits-entropy"] if n.endswith(path))
    torch.testing.assert_close(statistics.taylor["logits-entropy"][name].token, expected, rtol=1e-3, atol=1e-6)


def test_the_stream_sums(llama, statistics, text_file):
    data = sc.batches(text_file, sc.source_of(llama).input, limit=24, **TEXT)
    with torch.no_grad():
        states = torch.cat([torch.stack(llama(b, output_hidden_states=True).hidden_states[:3], 1) for b in data])
    cosine = F.cosine_similarity(states[:, 0], states[:, 1], dim=-1)
    assert float(statistics.stream.influence()[0]) == pytest.approx(1 - float(cosine.mean()), abs=1e-5)
    two = F.cosine_similarity(states[:, 0], states[:, 2], dim=-1)
    assert float(statistics.stream.influence(2)[0]) == pytest.approx(1 - float(two.mean()), abs=1e-5)
    angle = cosine.clamp(-1, 1).arccos() / math.pi
    assert float(statistics.stream.influence(angular=True)[0]) == pytest.approx(float(angle.mean()), abs=1e-4)


def test_an_unknown_successor_cannot_be_asked_of_an_encoder(text_file):
    import transformers as t

    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    model = t.BertForMaskedLM(t.BertConfig(**size, vocab_size=96)).eval()
    assert not sc.source_of(model).input.causal
    ids = torch.randint(5, 96, (8, 16))
    sc.calibrate(model, ids, **TEXT)
    with pytest.raises(DataError, match="needs labels"):
        sc.calibrate(model, ids, loss="cross-entropy", **TEXT)


@pytest.mark.parametrize("compensator", sc.list_compensators())
def test_compress_save_load_generate(language, text_file, tmp_path, compensator):
    result = sc.compress(
        language,
        text_file,
        keep_params=0.8,
        out=tmp_path / "small",
        limit=16,
        held_out=8,
        align=1,
        compensator=compensator,
        measure=False,
        **TEXT,
    )
    assert result.fidelity.perplexity > 0
    assert result.fidelity.quality == result.fidelity.dense_perplexity / result.fidelity.perplexity
    loaded = sc.load(tmp_path / "small")
    ids = torch.randint(3, 96, (2, 12))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, result.model(ids).logits)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    spec = sc.source_of(loaded).input
    assert spec.tokenizer == str(tmp_path / "small")
    assert len(sc.batches(text_file, spec, **TEXT).items) > 100
    _generates(loaded, ids)


def _generates(model, ids):
    """Greedy decoding with a cache gives what the whole sequence gives."""
    out = model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=True, pad_token_id=0, eos_token_id=None)
    assert out.shape == (2, 18)
    with torch.no_grad():
        whole = model(out[:, :-1], use_cache=False).logits[:, 11:].argmax(-1)
    assert torch.equal(whole, out[:, 12:])


def test_gguf_needs_a_real_file(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF but not really")
    with pytest.raises(SourceError, match="could not be opened"):
        sc.load_model(file)


def test_what_has_no_plain_weights_is_refused(language, tmp_path):
    for file in language.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match=r"is quantised \(gptq\).* give the floating-point checkpoint"):
        sc.load_model(tmp_path)
    with pytest.raises(SourceError, match="in pieces on several devices; leave tp_plan out"):
        sc.load_model(language, tp_plan="auto")


def test_saving_without_a_tokenizer_says_so(tmp_path):
    import transformers as t

    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    model = t.LlamaForCausalLM(t.LlamaConfig(**size, vocab_size=96))
    with pytest.warns(SecateurWarning, match="saved without its tokenizer"):
        sc.save(model, tmp_path / "small")
    ids = torch.randint(0, 96, (2, 8))
    assert torch.equal(sc.load(tmp_path / "small")(ids).logits, model.eval()(ids).logits)


def test_the_command_line(secateur, language, text_file, tmp_path):
    small, protocol = tmp_path / "small", ("--window", 16, "--limit", 12)
    done = secateur(
        "compress", language, "--text", text_file, "--keep-params", 0.8, "--align", 1, "--out", small, *protocol
    )
    assert done.status == 0, done.err
    assert "perplexity per token" in done.out
    done = secateur("evaluate", small, "--text", text_file, *protocol)
    assert "perplexity per token (12 windows of 16 tokens, stride 16)" in done.out
    assert "perplexity per word" in done.out
    done = secateur("evaluate", small, "--text", text_file, "--against", language, *protocol)
    assert "KL to dense" in done.out
    error = secateur(
        "compress", language, "--text", text_file, "--keep-params", 0.8, "--out", small, "--window", 99
    ).error
    assert "longer than the model's context of 64" in error
