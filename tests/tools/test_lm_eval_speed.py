"""The harness answers alike through our backend and through its own, `hf`, at a tiny size."""

import pytest
from harness_tasks import TASKS, WORDS, write_tasks
from lm_eval_speed import both, compared, difference, requests_of
from made_tokenizers import SPECIAL, byte_level, write_folder

PARITY = "needs the extras eval and parity"
# As Llama 3 has it: each text begins with the begin-of-text token.
BEGINS = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": SPECIAL[1], "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {SPECIAL[1]: {"id": SPECIAL[1], "ids": [1], "tokens": [SPECIAL[1]]}},
}


@pytest.fixture(scope="module")
def requests(tmp_path_factory):
    """Requests of all methods, some longer than 64 tokens."""
    pytest.importorskip("lm_eval", reason=PARITY)
    datasets = pytest.importorskip("datasets", reason=PARITY)
    folder = tmp_path_factory.mktemp("tasks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        write_tasks(folder, documents=12, longest=40)
        return requests_of([*TASKS], str(folder), None)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch and transformers
@pytest.mark.parametrize("begins", [False, True], ids=["plain", "bos"])
def test_both_backends_answer_alike(begins, requests, tmp_path):
    transformers = pytest.importorskip("transformers", reason=PARITY)
    pytest.importorskip("torch", reason=PARITY).manual_seed(0)
    made = byte_level([" ".join(WORDS)] * 3, 300)
    if begins:
        import json

        made = json.dumps(json.loads(made) | {"post_processor": BEGINS})
    write_folder(tmp_path, made)
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    ids = {"bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 2}
    config = transformers.LlamaConfig(**sizes, **heads, **ids, initializer_range=0.5)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    ours, theirs = both(str(tmp_path), "float32", "cpu", 4)
    found = compared(ours, theirs, requests, times=1)
    assert len(found) == 3
    for method, peers in found.items():
        worst, same = difference(method, peers)
        assert worst < 1e-3, method
        assert same == 1, method
    assert ours.cut
    assert len(set(found["generate_until"].ours)) > 6
