"""Language models of every architecture, tiny: their configs, and what can be cut in each."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from secateur.anatomy.verify import randomise_

VOCABULARY = 67
_BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_GROUPED = {**_BASE, "num_key_value_heads": 3, "head_dim": 8}  # 3 key/value heads, 2 queries each
_MOE = {**_GROUPED, "num_experts_per_tok": 2, "num_experts": 6, "num_local_experts": 6}
_OLD = {"vocab_size": VOCABULARY, "n_embd": 48, "n_layer": 2, "n_head": 6, "n_inner": 24, "n_positions": 64}
_OLD |= {"eos_token_id": None, "bos_token_id": 1, "pad_token_id": 0}
_FALCON = {**_BASE, "alibi": False, "multi_query": False, "new_decoder_architecture": False}
_LATENT = {
    **_BASE,
    "num_key_value_heads": 6,
    "moe_intermediate_size": 24,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 8,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
}
_T5 = {"vocab_size": VOCABULARY, "d_model": 48, "d_kv": 6, "d_ff": 24, "num_layers": 2, "num_heads": 6}
_T5 |= {"pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": None}
_BART = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 2), ("ffn_dim", 24))}
_BART |= {f"{side}_attention_heads": 6 for side in ("encoder", "decoder")}
_BART |= {"vocab_size": VOCABULARY, "d_model": 48, "max_position_embeddings": 64, "decoder_start_token_id": 1}
_BART |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "forced_eos_token_id": None}

_MHA = {"heads": 2, "hidden": 2}
_MLP = {"hidden": 2}  # ALiBi: every head has a slope of its own, which code computes from their number
_GQA = {"kv_groups": 2, "heads": 2, "hidden": 2}
_EXPERTS = {"kv_groups": 2, "heads": 2, "hidden": 2, "experts": 2}

# name: model type, config, how many groups of each kind can be cut.
CAUSAL: dict[str, tuple[str, dict, dict[str, int]]] = {
    "llama": ("llama", _GROUPED, _GQA),
    "mistral": ("mistral", _GROUPED, _GQA),
    "qwen2": ("qwen2", _GROUPED, _GQA),
    "qwen3": ("qwen3", _GROUPED, _GQA),
    "gemma2": ("gemma2", _GROUPED, _GQA),
    "gemma3": ("gemma3_text", _GROUPED, _GQA),
    "olmo": ("olmo", _GROUPED, _GQA),
    "phi": ("phi", _GROUPED, _GQA),
    "starcoder2": ("starcoder2", _GROUPED, _GQA),
    "granite": ("granite", _GROUPED, _GQA),
    "cohere": ("cohere", _GROUPED, _GQA),
    "cohere2": ("cohere2", _GROUPED, _GQA),
    "glm": ("glm", _GROUPED, _GQA),
    "olmo2": ("olmo2", _GROUPED, _GQA),
    "phi3": ("phi3", _GROUPED, _GQA),
    "stablelm": ("stablelm", _GROUPED, _GQA),
    "opt": ("opt", {**_BASE, "ffn_dim": 24, "word_embed_proj_dim": 48}, _MHA),
    "gpt2": ("gpt2", _OLD, _MHA),
    "gpt_neox": ("gpt_neox", _BASE, _MHA),
    "gptj": ("gptj", {**_OLD, "rotary_dim": 4}, _MHA),
    "codegen": ("codegen", {**_OLD, "n_embd": 96, "n_head": 12, "rotary_dim": 4}, _MHA),
    "gpt_neo": (
        "gpt_neo",
        {**_BASE, "num_layers": 2, "num_heads": 6, "attention_types": [[["global", "local"], 1]], "window_size": 8},
        _MHA,
    ),
    "persimmon": ("persimmon", _BASE, _MHA),
    "xglm": ("xglm", {**_BASE, "d_model": 48, "num_layers": 2, "attention_heads": 6, "ffn_dim": 24}, _MHA),
    "gpt_bigcode, one key/value head": ("gpt_bigcode", _OLD, _MHA),
    "gpt_bigcode": ("gpt_bigcode", {**_OLD, "multi_query": False}, _MHA),
    "falcon": ("falcon", {**_FALCON, "ffn_hidden_size": 24}, _MHA),
    "falcon, one key/value head": ("falcon", {**_FALCON, "ffn_hidden_size": 24, "multi_query": True}, _MHA),
    "falcon, new": (
        "falcon",
        {**_FALCON, "ffn_hidden_size": 24, "new_decoder_architecture": True, "num_kv_heads": 3},
        _GQA,
    ),
    "falcon, slopes": ("falcon", {**_FALCON, "ffn_hidden_size": 24, "alibi": True}, _MLP),
    "bloom": ("bloom", {**_BASE, "n_layer": 2, "n_head": 6}, _MLP),
    "mpt": ("mpt", {**_OLD, "d_model": 48, "n_heads": 6, "n_layers": 2, "expansion_ratio": 1, "max_seq_len": 64}, _MLP),
    "mamba": ("mamba", {**_BASE, "state_size": 4}, {"channels": 2, "hidden": 2}),
    "mixtral": ("mixtral", _MOE, _EXPERTS),
    "qwen2_moe": (
        "qwen2_moe",
        {**_MOE, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 20},
        {**_EXPERTS, "hidden": 4},
    ),
    "qwen3_moe": ("qwen3_moe", {**_MOE, "moe_intermediate_size": 24}, _EXPERTS),
    "granitemoe": ("granitemoe", {**_MOE}, _EXPERTS),
    "olmoe": ("olmoe", _MOE, _EXPERTS),
    "phimoe": ("phimoe", {**_MOE}, _EXPERTS),
    "gpt_oss": ("gpt_oss", _MOE, _EXPERTS),
    "llama4": (
        "llama4_text",
        {**_MOE, "intermediate_size_mlp": 20, "interleave_moe_layer_step": 1},
        {**_EXPERTS, "hidden": 4},
    ),
    "deepseek_v2": ("deepseek_v2", _LATENT, {"heads": 2, "hidden": 7, "experts": 1}),
    "deepseek_v3": ("deepseek_v3", _LATENT, {"heads": 2, "hidden": 7, "experts": 1}),
}
BOTH_WAYS: dict[str, tuple[str, dict, dict[str, int]]] = {
    "bert": ("bert", _BASE, _MHA),
    "roberta": ("roberta", _BASE, _MHA),
    "modernbert": ("modernbert", _BASE, _MHA),
}
ENCODER_DECODER: dict[str, tuple[str, dict, dict[str, int]]] = {
    "t5": ("t5", _T5, {"heads": 3, "hidden": 4}),
    "bart": ("bart", _BART, {"heads": 6, "hidden": 4}),
}
ALL = {**CAUSAL, **BOTH_WAYS, **ENCODER_DECODER}


def make(name: str) -> tuple[nn.Module, Tensor]:
    """A randomised model and two sequences of 9 tokens."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

    kind, sizes, _ = ALL[name]
    auto = {**dict.fromkeys(BOTH_WAYS, AutoModelForMaskedLM), **dict.fromkeys(ENCODER_DECODER, AutoModelForSeq2SeqLM)}
    torch.manual_seed(0)
    model = auto.get(name, AutoModelForCausalLM).from_config(AutoConfig.for_model(kind, **sizes)).eval()
    randomise_(model)
    return model, torch.randint(3, VOCABULARY, (2, 9))


def forward(model: nn.Module, x: Tensor):
    """Logits [2, 9, V] in the first place; an encoder-decoder decodes what it encodes."""
    if model.config.is_encoder_decoder:
        return model(input_ids=x, decoder_input_ids=x, use_cache=False)
    return model(input_ids=x, use_cache=False)
