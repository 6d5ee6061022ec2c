"""Which keys of a config.json a family reads, which decide nothing of what a model computes, and which must not be set.

A key that nobody looked at can change the arithmetic unseen: engines read more keys than one family's class has. So
each family lists every key of its configuration class in transformers, and what stands here is common to all: keys of
the base class, of generation and of training, which decide nothing, and keys by which other families compute otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gs_dist.errors import CheckpointError
from gs_dist.model.config_keys import ConfigKeys

__all__ = ["FOREIGN", "HARMLESS", "READ", "ROPE_KEYS", "KnownKeys"]

Values = tuple[Any, ...]

READ = frozenset(
    {
        "dtype",
        "eos_token_id",
        "head_dim",
        "hidden_act",
        "hidden_size",
        "intermediate_size",
        "max_position_embeddings",
        "model_type",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "original_max_position_embeddings",
        "partial_rotary_factor",
        "rms_norm_eps",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "tie_word_embeddings",
        "torch_dtype",
        "vocab_size",
    }
)
"""Keys that `config_parts` and `config_rotary` read for every family."""

_BASE = """
_attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash _experts_implementation
_experts_implementation_internal _flash_attn_2_enabled _from_model_config _name_or_path _output_attentions
add_bos_token add_eos_token add_prefix_space architectures attn_implementation auto_map bos_token bos_token_id
chat_template chunk_size_feed_forward cross_attention_hidden_size custom_pipelines decoder_start_token_id
distributed_config eos_token experts_implementation finetuning_task id2label is_decoder keys_to_ignore_at_inference
label2id max_length max_sequence_length model_max_length name_or_path num_labels output_attentions
output_hidden_states pad_token pad_token_id prefix problem_type quantization_config return_dict sep_token_id
task_specific_params tf_legacy_loss tokenizer_class tokenizer_padding_side torchscript transformers_version unk_token
unk_token_id use_bfloat16 use_cache use_return_dict
"""
_GENERATION = """
assistant_confidence_threshold assistant_early_exit assistant_lookbehind bad_words_ids begin_suppress_tokens
cache_config cache_implementation compile_config constraints continuous_batching_config diversity_penalty do_sample
dola_layers early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty epsilon_cutoff eta_cutoff
exponential_decay_length_penalty forced_bos_token_id forced_decoder_ids forced_eos_token_id generation_config
generation_kwargs guidance_scale length_penalty low_memory max_matching_ngram_size max_new_tokens max_time min_length
min_new_tokens min_p no_repeat_ngram_size num_assistant_tokens num_assistant_tokens_schedule num_beam_groups num_beams
num_return_sequences output_logits output_scores penalty_alpha prefill_chunk_size prompt_lookup_num_tokens
remove_invalid_values renormalize_logits repetition_penalty return_dict_in_generate return_legacy_cache
sequence_bias stop_strings suppress_tokens target_lookbehind temperature token_healing top_h top_k top_p typical_p
use_mtp watermarking_config
"""
_TRAINING = """
attention_dropout attention_probs_dropout_prob attn_dropout attn_pdrop classifier_dropout dropout embd_pdrop
fused_qkv gradient_checkpointing hidden_dropout hidden_dropout_prob initializer_range layerdrop neftune_noise_alpha
pretraining_tp resid_pdrop summary_activation unsloth_fixed unsloth_version use_flash_attn use_flash_attention_2
use_sdpa
"""
HARMLESS = frozenset((_BASE + _GENERATION + _TRAINING).split())
"""Keys that say nothing of what a decoder computes when it is served. `architectures` and `quantization_config` have
checks of their own.
"""

_OFF: Values = (False, 0, "", (), [], {})
FOREIGN: Mapping[str, Values] = {
    # Attention.
    "add_cross_attention": _OFF,
    "add_swa_attention_sink_bias": _OFF,
    "alibi": _OFF,
    "attention_chunk_size": _OFF,
    "attention_multiplier": (),
    "attention_out_bias": _OFF,
    "attention_scale": (),
    "attention_value_scale": (1,),
    "attn_logit_softcapping": _OFF,
    "attn_temperature_tuning": _OFF,
    "bidirectional": _OFF,
    "clip_qkv": (),
    "is_causal": (True,),
    "is_encoder_decoder": _OFF,
    "layer_types": (),
    "num_kv_shared_layers": _OFF,
    "o_bias": _OFF,
    "qk_layernorm": _OFF,
    "qk_norm": _OFF,
    "query_pre_attn_scalar": (),
    "rope_interleaved": _OFF,
    "sliding_window": (),
    "sliding_window_pattern": (),
    "softmax_scale": (),
    "use_alibi": _OFF,
    "use_attention_sinks": _OFF,
    "use_bidirectional_attention": _OFF,
    "use_logn_attn": _OFF,
    "use_mrope": _OFF,
    "use_qk_norm": _OFF,
    # Positions.
    "no_rope_layer_interval": _OFF,
    "no_rope_layers": _OFF,
    "nope_layer_interval": _OFF,
    "position_embedding_type": ("rope", "rotary", "absolute"),  # the base class once stated "absolute" for every model
    "rope_local_base_freq": (),
    "rope_pct": (1,),
    "rope_ratio": (1,),
    "rope_traditional": _OFF,
    "rotary_dim": (),
    "rotary_emb_base": (),
    "rotary_emb_fraction": (1,),
    "rotary_pct": (1,),
    "use_dynamic_ntk": _OFF,
    "use_rope": (True,),
    # Multipliers and caps.
    "dim_model_base": (),
    "embedding_multiplier": (1,),
    "final_logit_softcapping": _OFF,
    "hidden_multiplier": (1,),
    "key_multiplier": (1,),
    "lm_head_multiplier": (1,),
    "logit_scale": (1,),
    "logits_mup_width_multiplier": (1,),
    "logits_scaling": (1,),
    "mup_enabled": _OFF,
    "residual_multiplier": (1,),
    "scale_depth": (),
    "scale_emb": (1,),
    "swiglu_limit": (),
    "unpadded_vocab_size": (),
    "use_mup": _OFF,
    # Norms, biases and shape of a layer.
    "add_bias_linear": _OFF,
    "apply_layernorm_1p": _OFF,
    "apply_residual_connection_post_layernorm": _OFF,
    "attention_bias": _OFF,
    "bias": _OFF,
    "hidden_activation": ("silu",),
    "layer_norm_eps": (),
    "lm_head_bias": _OFF,
    "mlp_bias": _OFF,
    "parallel_attn": _OFF,
    "per_layer_config": _OFF,
    "pruned_heads": _OFF,
    "qkv_bias": _OFF,
    "use_bias": _OFF,
    "use_parallel_residual": _OFF,
    "use_post_norm": _OFF,
    "use_qkv_bias": _OFF,
    # Another model altogether.
    "compression_config": (),
    "fusion_config": (),
    "moe_intermediate_size": _OFF,
    "n_routed_experts": _OFF,
    "num_experts": _OFF,
    "num_local_experts": _OFF,
    "num_nextn_predict_layers": _OFF,
    "quantization": (),
    "text_config": (),
    "tie_encoder_decoder": _OFF,
    "transformers_weights": (),
    "vision_config": (),
}
"""Keys by which engines or other families compute otherwise, to the values (besides null) at which they do not."""


ROPE_KEYS = frozenset(
    {
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "factor",
        "high_freq_factor",
        "llama_4_scaling_beta",
        "low_freq_factor",
        "mscale",
        "mscale_all_dim",
        "original_max_position_embeddings",
        "partial_rotary_factor",
        "rope_theta",
        "rope_type",
        "truncate",
        "type",
    }
)
"""Keys within `rope_parameters` and `rope_scaling` that `config_rotary` reads, or that the types it reads ignore."""

# Ending of a class's name to what such a model is.
_CLASSES: Mapping[str, str] = {
    "ForSequenceClassification": "a classifier, reward model or reranker",
    "ForTokenClassification": "a model that labels tokens",
    "ForQuestionAnswering": "a model that marks answers in texts",
    "ForConditionalGeneration": "a model that reads more than text",
    "RewardModel": "a reward model",
    "DraftModel": "a draft model, which guesses tokens for another one",
    "Eagle": "a draft model, which guesses tokens for another one",
    "Eagle3": "a draft model, which guesses tokens for another one",
    "Model": "a decoder without head, as embedding models are saved",
}


@dataclass(frozen=True, kw_only=True)
class KnownKeys:
    """What a family makes of the keys of a config.json; what it does not name is as for all families.

    Attributes:
        classes: names in `architectures` by which engines choose this family's causal language model; none are compared
            where it is empty.
        read: keys that its `read` heeds, besides `READ`.
        ignored: keys that change nothing in this family, whatever they hold.
        told: keys that the family's class does not heed and people may think it does: not heeded here either, and told.
        fixed: keys that would change the arithmetic, to the values (besides null) that are served.
    """

    classes: tuple[str, ...] = ()
    read: frozenset[str] = frozenset()
    ignored: frozenset[str] = frozenset()
    told: frozenset[str] = frozenset()
    fixed: Mapping[str, Values] = field(default_factory=dict)

    def refuse_others(self, keys: ConfigKeys) -> None:
        """Refuses a key at a value by which engines would compute something else, and another model's class.

        Raises:
            CheckpointError: there is one; the message names the key and the values that are served.
        """
        self._refuse_other_class(keys)
        for key, served in {**FOREIGN, **self.fixed}.items():
            if key in self.read | READ | self.ignored | self.told and key not in self.fixed:
                continue
            value = keys.values.get(key)
            if key == "layer_types" and isinstance(value, list) and all(kind == "full_attention" for kind in value):
                continue
            if value is not None and not any(_equal(value, one) for one in served):
                wanted = " or ".join(repr(one) for one in served[:1]) or "absent"
                raise CheckpointError(
                    f"config.json: {key} is {value!r:.200}, by which models of another kind compute otherwise; served "
                    f"for {keys.get('model_type')} is {wanted}: remove the key if this model does not use it"
                )

    def _refuse_other_class(self, keys: ConfigKeys) -> None:
        named = keys.values.get("architectures")
        if not self.classes or not named or (isinstance(named, list) and any(name in self.classes for name in named)):
            return
        named = named if isinstance(named, list) else [named]
        kinds = (kind for ending, kind in _CLASSES.items() if str(named[0]).endswith(ending))
        raise CheckpointError(
            f"config.json: architectures names {str(named[0])!r:.100}, {next(kinds, 'which is not served')}, and "
            f"model_type is {keys.get('model_type')}: transformers goes by the one, vLLM by the other. If this is a "
            f"causal language model of that type, write {self.classes[0]!r} there"
        )

    def unknown(self, keys: ConfigKeys) -> tuple[str, ...]:
        """Keys of which nothing is known, and those that are not heeded, in order."""
        known = READ | HARMLESS | self.read | self.ignored | set(FOREIGN) | set(self.fixed)
        found = [key for key in keys.values if key not in known or (key in self.told and keys.values[key])]
        for place in ("rope_parameters", "rope_scaling"):
            table = keys.values.get(place)
            if isinstance(table, Mapping):
                found += [f"{place}.{key}" for key in table if key not in ROPE_KEYS]
        return tuple(sorted(found))


def _equal(value: object, served: object) -> bool:
    """Whether a value is one that is served; false and 0 are one, and so are 1 and 1.0."""
    return type(value) in (bool, int, float, str, list, dict) and value == served
