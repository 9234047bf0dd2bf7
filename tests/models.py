"""Tiny random models of many architectures, and one plain forward per rollout as the oracle."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 29
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
GATED = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
HALF_SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}

CONFIGS = {
    "llama": GATED,
    "llama-mqa-untied": {**GATED, "num_key_value_heads": 1, "tie_word_embeddings": False},
    "qwen2": {k: v for k, v in GATED.items() if k != "head_dim"},
    "qwen3": GATED,
    "mistral-window": {**GATED, "sliding_window": 5},
    "gemma2": {
        **GATED,
        "sliding_window": 6,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "query_pre_attn_scalar": 8,
    },
    "gemma3_text": {**GATED, "sliding_window": 5, "layer_types": HALF_SLIDING, "query_pre_attn_scalar": 8},
    "gpt2": {
        "vocab_size": VOCABULARY,
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 128,
        "bos_token_id": 0,
        "eos_token_id": 1,
    },
    "gpt_neox": {**SMALL, "intermediate_size": 48, "rotary_pct": 0.5},
    "opt": {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi": {**SMALL, "intermediate_size": 48},
    "olmo2": {k: v for k, v in GATED.items() if k != "head_dim"},
    "granite": {**GATED, "logits_scaling": 2.0, "attention_multiplier": 0.3, "residual_multiplier": 0.7},
    "cohere": {**GATED, "logit_scale": 0.5},
    "qwen3_moe": {**GATED, **EXPERTS, "num_experts": 4},
    "gpt_oss": {**GATED, "num_local_experts": 4, "sliding_window": 5, "num_experts_per_tok": 2},
    "deepseek_v3": {  # values of another width than keys
        **{k: v for k, v in GATED.items() if k != "head_dim"},
        "num_key_value_heads": 4,
        **{"q_lora_rank": 12, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6},
        **{"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2},
        **{"moe_intermediate_size": 24, "first_k_dense_replace": 1},
    },
}
NAMES = tuple(CONFIGS)

# Models that cannot share a prefix: ALiBi outside the attention interface, recurrent states, convolutions, hybrids,
# windows that attention is not told of.
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "num_hidden_layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
STATE_SPACE = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
UNSHARED = {
    "bloom": {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": {**SMALL, "alibi": True, "new_decoder_architecture": False, "parallel_attn": False, "multi_query": False},
    "qwen3_5_text": {**GATED, **LINEAR},
    "lfm2": {
        **{k: v for k, v in GATED.items() if k != "head_dim"},
        "layer_types": ["conv", "full_attention", "conv"],
    },
    "falcon_h1": {**GATED, **STATE_SPACE, "mamba_d_ssm": 32},
    "qwen2_moe": {  # windows by its mask alone
        **{k: v for k, v in GATED.items() if k != "head_dim"},
        **{**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 24},
        **{"use_sliding_window": True, "sliding_window": 8, "layer_types": HALF_SLIDING},
    },
    "mamba": {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
}
# Their caches lose the state of the prefix in this version of transformers.
WITHOUT_A_USABLE_CACHE = {
    "bamba": {**GATED, **STATE_SPACE, "attn_layer_indices": [1], "mamba_d_head": 16},
    "recurrent_gemma": {
        **GATED,
        "num_key_value_heads": 1,
        "lru_width": 32,
        "attention_window_size": 64,
    },
}


def tiny(name: str = "llama", *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes):
    """A random model, weights drawn wide enough that attention is far from uniform."""
    known = {**CONFIGS, **UNSHARED, **WITHOUT_A_USABLE_CACHE}
    config = AutoConfig.for_model(name.split("-")[0], **{**known[name], **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.25)
    return model.eval()


def plain_logits(model, context: torch.Tensor) -> torch.Tensor:
    """[T'] tokens -> [T',V] logits of one plain forward."""
    ones = torch.ones_like(context)[None]
    return model(input_ids=context[None], attention_mask=ones, use_cache=False).logits[0]


def independent_score(model, tokens, anchors, anchor_mask, rollout_tokens, rollout_mask, starts=None):
    """One forward per prefix and rollout: [B,K,N,G] log-probs at temperature 1, 0 where masked, with gradient.

    `starts` [B,K]: where the context's document starts, 0 by default.
    """
    _, _, rollouts, horizon = rollout_tokens.shape
    rows = []
    for b, k in torch.cartesian_prod(*map(torch.arange, anchors.shape)).tolist():
        begin, a = (0 if starts is None else int(starts[b, k])), int(anchors[b, k])
        for n in range(rollouts):
            if not anchor_mask[b, k]:
                rows.append(torch.zeros(horizon, dtype=model.dtype))
                continue
            row = torch.cat([tokens[b, begin:a], rollout_tokens[b, k, n]])
            log_probs = plain_logits(model, row).log_softmax(-1)[a - begin - 1 : -1]
            picked = log_probs.gather(-1, rollout_tokens[b, k, n, :, None])[:, 0]
            rows.append(torch.where(rollout_mask[b, k, n], picked, 0.0))
    return torch.stack(rows).view(rollout_tokens.shape)
