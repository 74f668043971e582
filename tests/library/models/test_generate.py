"""Generation: cached decoding is the full forward pass, rows are independent, and where they end."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from architectures import CONFIGS, random_params
from slow import slow

from mora_jax import sharding
from mora_jax.errors import InputError
from mora_jax.methods import MoRA, Rotate
from mora_jax.models import generate as generation
from mora_jax.models.cache import Cache
from mora_jax.models.generate import Sampling, generate
from mora_jax.models.llama import LAYOUTS, STACKED, Compute, Llama
from mora_jax.transform import assign, attach, bind, merge

F32 = Compute(dtype="float32", layers="scan")
# Beyond every window, and for the longest prompt up to the context of "llama, dynamic".
NEW = 11
PROMPTS = [
    np.random.default_rng(i).integers(0, 97, length).tolist() for i, length in enumerate((5, 21, 1, 12))
]
GREEDY = Sampling(max_new_tokens=NEW)


@pytest.fixture(autouse=True, scope="module")
def short_chunks():
    """Prompts are read in several parts."""
    before, generation.CHUNK = generation.CHUNK, 8
    yield
    generation.CHUNK = before


@functools.cache
def llama(name: str = "llama, dynamic") -> tuple[Llama, dict]:
    return Llama(CONFIGS[name], F32), random_params(CONFIGS[name])


def full_logits(model, params, rows: list[list[int]]) -> np.ndarray:
    """Logits of rows without a cache. What pads them at the end changes nothing before it."""
    tokens_BT = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for i, row in enumerate(rows):
        tokens_BT[i, : len(row)] = row
    return np.asarray(jax.jit(model.apply)({"params": params}, tokens_BT))


def cached_logits(model, params, rows: list[list[int]], new: int) -> np.ndarray:
    """Logits of the last tokens of rows that are padded on the left, fed one by one: (B, new, V)."""
    length = max(map(len, rows))
    starts_B = np.array([length - len(row) for row in rows], np.int32)
    tokens_BT = np.array([[0] * (length - len(row)) + row for row in rows], np.int32)

    @jax.jit
    def run(params, tokens_BT, starts_B):
        def feed(cache, tokens_BT):
            logits_BV, cache = model.apply({"params": params}, tokens_BT, cache, method="extend")
            return cache, logits_BV

        cache = Cache.empty(model.config, model.compute.dtype, starts_B, length + 3)
        cache, first_BV = feed(cache, tokens_BT[:, :-new])
        _, logits = jax.lax.scan(feed, cache, tokens_BT[:, -new:].T[:, :, None])
        return jnp.concatenate([first_BV[None], logits[:-1]]).swapaxes(0, 1)

    return np.asarray(run(params, tokens_BT, starts_B))


@pytest.mark.parametrize(
    "name",
    [
        "llama, dynamic",
        *(slow(name) for name in ("qwen3, biases, window", "mistral, window")),
    ],
)
def test_cached_decoding_is_the_full_forward_pass(name):
    model, params = llama(name)
    found = generate(model, params, PROMPTS, GREEDY)
    rows = [prompt + new for prompt, new in zip(PROMPTS, found, strict=True)]
    full = full_logits(model, params, rows)
    wanted = np.stack([full[i, len(p) - 1 : len(p) - 1 + NEW] for i, p in enumerate(PROMPTS)])
    assert found == wanted.argmax(-1).tolist()
    assert len({tuple(new) for new in found}) == len(PROMPTS)
    logits = cached_logits(model, params, rows, NEW)
    np.testing.assert_allclose(logits, wanted, atol=1e-5 * np.abs(wanted).max())


def test_a_rows_sample_does_not_depend_on_its_neighbours():
    model, params = llama()
    sampling = Sampling(max_new_tokens=NEW, temperature=0.9, top_p=0.9, seed=3)
    together = generate(model, params, PROMPTS, sampling)
    alike = generate(model, params, [*PROMPTS[1:2] * 3, PROMPTS[0]], sampling)
    turned = generate(model, params, PROMPTS[::-1], sampling, numbers=[3, 2, 1, 0])
    assert turned[::-1] == together
    assert alike[1] == together[1]
    assert len({tuple(new) for new in alike}) == 4  # rows of one prompt differ
    other = Sampling(max_new_tokens=NEW, temperature=0.9, top_p=0.9, seed=4)
    assert generate(model, params, PROMPTS, other) != together


@pytest.mark.slow
def test_a_row_alone_is_the_row_in_a_batch():
    model, params = llama()
    sampling = Sampling(max_new_tokens=NEW, temperature=0.9, top_p=0.9, seed=3)
    together = generate(model, params, PROMPTS, sampling)
    for i, prompt in enumerate(PROMPTS):
        assert generate(model, params, [prompt], sampling, numbers=[i]) == [together[i]]


def test_top_p_keeps_the_fewest_tokens_that_reach_it():
    p_BV = jnp.array([[0.1, 0.4, 0.3, 0.2], [0.97, 0.01, 0.01, 0.01]])
    kept = generation._nucleus(jnp.log(p_BV), jnp.float32(0.65)) > -jnp.inf
    assert kept.tolist() == [[False, True, True, False], [True, False, False, False]]


def test_draws_follow_the_probabilities():
    logits_BV = jnp.log(jnp.array([0.1, 0.6, 0.3])) * 2.0
    keys_B = jax.random.split(jax.random.key(0), 2000)
    how = generation.How(jnp.float32(2.0), jnp.float32(1.0), keys_B, keys_B, keys_B)
    drawn = jax.jit(generation._chosen)(how, 5, jnp.tile(logits_BV[None], (2000, 1)))
    np.testing.assert_allclose(np.bincount(drawn) / 2000, [0.1, 0.6, 0.3], atol=0.04)


def test_where_rows_end():
    model, params = llama()
    whole = generate(model, params, PROMPTS, GREEDY)
    eos = next(t for t in whole[0][3:] if whole[0].index(t) > 2)
    first = [new.index(eos) + 1 if eos in new else NEW for new in whole]
    ended = generate(model, params, PROMPTS, Sampling(max_new_tokens=NEW, eos_ids=(96, eos)))
    eos96 = [new.index(96) + 1 if 96 in new else NEW for new in whole]
    assert ended == [new[: min(a, b)] for new, a, b in zip(whole, first, eos96, strict=True)]
    seen = []

    def at_seven(row, tokens):
        seen.append((row, len(tokens)))
        return 7 if row == 1 and len(tokens) >= 7 else None

    cut = generate(model, params, PROMPTS, GREEDY, ended=at_seven, every=5)
    assert cut == [whole[0], whole[1][:7], *whole[2:]]
    assert [n for row, n in seen if row == 1] == [1, 6, 11]


def test_a_row_ends_where_the_context_does():
    """Of dynamic positions too, which no cache can extend: earlier keys would have to be rotated again."""
    found = generate(*llama(), PROMPTS, Sampling(max_new_tokens=NEW + 3))
    assert [len(new) for new in found] == [NEW + 3, 32 - 21, NEW + 3, NEW + 3]


@pytest.mark.slow  # test_llama.py compares whole forward passes
def test_unmerged_adapters_are_the_merged_ones():
    model, params = llama()
    rules = [("layers/mlp/.*kernel", MoRA(4, Rotate())), ("layers/.*kernel", MoRA(4)), (".*", "frozen")]
    methods = assign(rules, params, STACKED)
    adapters = jax.tree.map(
        lambda a: 0.1 * jax.random.normal(jax.random.key(a.size), a.shape),
        attach(jax.random.key(1), params, methods),
    )
    merged = generate(model, merge(params, adapters, methods), PROMPTS, GREEDY)
    assert generate(model, bind(params, adapters, methods), PROMPTS, GREEDY) == merged
    assert generate(model, params, PROMPTS, GREEDY) != merged


@pytest.mark.slow
def test_a_mesh_changes_nothing_and_neither_it_nor_options_compile_anew():
    model, params = llama()
    expected = generate(model, params, PROMPTS, GREEDY)
    mesh = sharding.make_mesh(1, 2, 2)
    with jax.set_mesh(mesh):
        params = jax.device_put(params, sharding.shardings(params, mesh, LAYOUTS))
        assert generate(model, params, PROMPTS, GREEDY, every=5) == expected
        before = generation.prefill._cache_size(), generation.decode._cache_size()
        sampling = Sampling(max_new_tokens=NEW - 3, temperature=0.5, top_p=0.5, seed=1)
        generate(model, params, [p[:20] for p in PROMPTS[:3]], sampling)
        assert (generation.prefill._cache_size(), generation.decode._cache_size()) == before


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "there is no prompt"),
        ([[1], []], "prompt 2 has no token"),
        ([[1] * 32], "prompt 1 has 32 tokens, which leaves no room in the model's context of 32"),
        ([[1, 97]], "prompt 1 has token 97, and the model a vocabulary of 97"),
    ],
)
def test_a_prompt_that_cannot_be_continued(prompts, message):
    with pytest.raises(InputError, match=message):
        generate(*llama(), prompts)


@pytest.mark.parametrize(
    "field",
    [
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": 1e39},
        {"top_p": 0.0},
    ],
)
def test_an_impossible_option(field):
    with pytest.raises(InputError, match=next(iter(field))):
        Sampling(**field)


def test_the_cache_ends_where_the_context_does(monkeypatch):
    """Whatever number of new tokens is asked for."""
    seen = []

    def prefill(model, params, how, tokens_BT, starts_B, slots):
        seen.append(slots)
        raise InputError("enough")

    monkeypatch.setattr(generation, "prefill", prefill)
    model, params = llama()
    for most in (NEW, 10**6):
        with pytest.raises(InputError, match="enough"):
            generate(model, params, [[1, 2, 3]], Sampling(max_new_tokens=most))
    assert seen == [32, 64]  # powers of two above 16 + 11, and 16 + 29 up to the context of 32
