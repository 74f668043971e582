"""What config.json may say: the defaults of each architecture, and the fields that change no result."""

from typing import Any, NamedTuple


class Format(NamedTuple):
    """How config.json describes an architecture.

    Attributes:
      model_class: class of transformers.
      defaults: what absent fields mean, where it is not the default of `LlamaConfig`.
      window_fields: fields beside `sliding_window` that say which layers have a window.
    """

    model_class: str
    defaults: dict[str, Any]
    window_fields: tuple[str, ...] = ()


_OF_QWEN = {"num_key_value_heads": 32, "max_position_embeddings": 32_768}
_LAYERS = ("use_sliding_window", "max_window_layers", "layer_types")

# By model_type.
FORMATS = {
    "llama": Format("LlamaForCausalLM", {}),
    "mistral": Format("MistralForCausalLM", {"num_key_value_heads": 8, "max_position_embeddings": 131_072}),
    "qwen2": Format("Qwen2ForCausalLM", _OF_QWEN, _LAYERS),
    "qwen3": Format("Qwen3ForCausalLM", _OF_QWEN | {"head_dim": 128}, _LAYERS),
    "olmo2": Format("Olmo2ForCausalLM", {"rms_norm_eps": 1e-5}),
}

# Fields that must have one of these values if they are given: any other model is not what we compute.
ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish", None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0.0, None),
    "hidden_dropout": (0.0, None),
    "residual_dropout": (0.0, None),
    "embedding_dropout": (0.0, None),
    "partial_rotary_factor": (1.0, None),
    "rope_interleaved": (False, None),
    "use_mrope": (False, None),
    "sliding_window": (None,),
    "use_sliding_window": (False, None),
    "layer_types": (None,),
    "no_rope_layers": (None,),
    "use_qk_norm": (False, None),
    "clip_qkv": (None,),
    "quantization_config": (None,),
    "auto_map": (None,),
    "add_cross_attention": (False, None),
    "cross_attention_hidden_size": (None,),
    "is_encoder_decoder": (False, None),
    "tie_encoder_decoder": (False, None),
    "chunk_size_feed_forward": (0, None),
    "pruned_heads": ({}, None),
}

# Fields that change no logits. Training has no dropout, so no dropout is among them.
NO_EFFECT = frozenset((
    "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_flash_attn_2_enabled",
    "_from_model_config", "_model_name_or_path", "_name_or_path", "bos_token_id", "cls_token_id",
    "decoder_start_token_id",
    "dtype", "eos_token_id", "finetuning_task", "id2label", "is_decoder", "is_llama_config", "label2id",
    "mask_token_id", "max_sequence_length", "model_max_length", "name_or_path", "output_attentions",
    "output_hidden_states", "pad_token_id", "prefix", "pretraining_tp", "problem_type", "return_dict",
    "sep_token_id", "task_specific_params", "tf_legacy_loss", "tokenizer_class", "torch_dtype",
    "torchscript", "transformers.js_config", "transformers_version", "unk_token_id", "unsloth_fixed",
    "unsloth_version", "use_bfloat16", "use_cache",
    # Of generation.
    "bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping",
    "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "forced_bos_token_id",
    "forced_eos_token_id", "length_penalty", "max_length", "min_length", "no_repeat_ngram_size",
    "num_beam_groups", "num_beams", "num_return_sequences", "output_scores", "remove_invalid_values",
    "repetition_penalty", "return_dict_in_generate", "suppress_tokens", "temperature", "top_k", "top_p",
    "typical_p",
))  # fmt: skip
