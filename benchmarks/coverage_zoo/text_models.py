"""transformers: language models, each from its config class with every size it knows under a usual name made tiny."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

TASKS = {"CausalLM": "CAUSAL_LM", "MaskedLM": "MASKED_LM", "Seq2SeqLM": "SEQ_TO_SEQ_CAUSAL_LM"}
VOCABULARY = 67
LARGEST = 3e6  # parameters; more than this was not made small

# 6 heads of size 8, 3 key/value heads, 6 experts of which 2 are taken, 24 hidden units, 2 layers.
_SAME = {
    48: "hidden_size n_embd d_model word_embed_proj_dim lru_width attention_hidden_size",
    24: "intermediate_size n_inner ffn_dim d_ff ffn_hidden_size encoder_ffn_dim decoder_ffn_dim moe_intermediate_size"
    " shared_expert_intermediate_size shared_intermediate_size intermediate_size_mlp",
    6: "num_attention_heads n_head num_heads attention_heads encoder_attention_heads decoder_attention_heads"
    " num_experts num_local_experts n_routed_experts moe_num_experts mamba_n_heads mamba_num_heads",
    3: "num_key_value_heads num_kv_heads mamba_dt_rank",
    2: "num_hidden_layers n_layer num_layers encoder_layers decoder_layers num_experts_per_tok num_experts_per_token"
    " moe_k moe_topk top_k_experts linear_num_key_heads mamba_expand",
    8: "head_dim d_kv linear_key_head_dim linear_value_head_dim window_size hidden_size_per_layer_input",
    4: "state_size rotary_dim mamba_d_state linear_num_value_heads conv_kernel",
    16: "mamba_d_head mamba_head_dim",
    64: "max_position_embeddings n_positions n_ctx max_seq_len",
    1: "expansion_ratio first_k_dense_replace n_shared_experts n_group topk_group mamba_n_groups n_groups bos_token_id"
    " decoder_start_token_id",
    0: "pad_token_id moe_layer_start_index",
    VOCABULARY: "vocab_size vocab_size_per_layer_input",
}
TINY: dict[str, Any] = {name: size for size, names in _SAME.items() for name in names.split()}
TINY |= {"attention_types": [[["global", "local"], 1]], "use_mamba_kernels": False, "is_decoder": True}
TINY["use_cache"] = False
# Attention through a low rank has no key/value heads of its own, and head sizes of its own.
LATENT = TINY | {
    "num_key_value_heads": 6,
    "kv_lora_rank": 16,
    "q_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 8,
}
LATENT = {name: size for name, size in LATENT.items() if name != "head_dim"}


def cases() -> list[dict[str, Any]]:
    """One case per model type and task that can be made tiny."""
    from transformers.models.auto import modeling_auto

    found = []
    for auto, task in TASKS.items():
        for kind in sorted(set(getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES"))):
            case = {"library": "text", "family": kind, "name": f"{kind} {auto}"}
            try:
                build(case)
            except Exception:  # no tiny config, or one that this way of calling does not suit
                continue
            found.append(case)
    return found


def build(case: dict[str, Any]) -> tuple[nn.Module, Any, str]:
    """The model, two sequences of 9 tokens, and what was made smaller."""
    import transformers

    transformers.logging.set_verbosity_error()
    kind, _, auto = case["name"].rpartition(" ")
    cls = getattr(transformers, f"AutoModelFor{auto}")
    error: Exception | None = None
    for sizes in (TINY, LATENT):
        try:
            config = _config(kind, sizes, decoder=auto == "CausalLM")
            with torch.device("meta"):
                count = sum(p.numel() for p in cls.from_config(config).parameters())
            if count > LARGEST:
                raise ValueError(f"{count / 1e6:.0f} million parameters, not small")
            torch.manual_seed(0)
            model = cls.from_config(config).eval()
            example = torch.randint(3, VOCABULARY - 1, (2, 9))
            with torch.no_grad():
                forward(model, example)
        except Exception as e:  # any refusal: try the next
            error = error or e
            continue
        return model, example, "2 layers, width 48"
    raise RuntimeError(f"{type(error).__name__}: {error}")


def _config(kind: str, sizes: dict[str, Any], decoder: bool) -> Any:
    from transformers import AutoConfig

    cls = type(AutoConfig.for_model(kind))
    known = set(vars(cls())) | set(getattr(cls, "attribute_map", {}))
    known = known.union(*(getattr(base, "__annotations__", {}) for base in cls.__mro__))
    chosen = {k: v for k, v in sizes.items() if k in known and (decoder or k != "is_decoder")}
    return AutoConfig.for_model(kind, **chosen, eos_token_id=None)


def forward(model: Any, x: Tensor) -> Any:
    """Logits; what has a decoder beside its encoder decodes what it encodes."""
    more = {"decoder_input_ids": x} if model.config.is_encoder_decoder else {}
    return model(input_ids=x, **more).logits


def caller(_case: dict[str, Any]) -> Callable[[nn.Module, Any], Any]:
    return forward
