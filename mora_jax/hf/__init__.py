"""Hugging Face folders: weights, config.json and tokenizer, read and written without torch."""

from mora_jax.hf.adapter_load import adapter_rules, load_adapter, load_arrays, read_adapter
from mora_jax.hf.adapter_save import save_adapter
from mora_jax.hf.config import read_config
from mora_jax.hf.folder import remove_leftovers, whole_folder
from mora_jax.hf.hub import is_hub_id, local_folder
from mora_jax.hf.merge import merge_adapters
from mora_jax.hf.tokenizer import check_tokenizer, save_tokenizer, special_ids
from mora_jax.hf.tokenizer_files import TokenizerFiles, read_tokenizer
from mora_jax.hf.weights import load_hf, save_hf, stored_types

__all__ = [
    "TokenizerFiles",
    "adapter_rules",
    "check_tokenizer",
    "is_hub_id",
    "load_adapter",
    "load_arrays",
    "load_hf",
    "local_folder",
    "merge_adapters",
    "read_adapter",
    "read_config",
    "read_tokenizer",
    "remove_leftovers",
    "save_adapter",
    "save_hf",
    "save_tokenizer",
    "special_ids",
    "stored_types",
    "whole_folder",
]
