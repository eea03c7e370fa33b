"""Speculative decoding: the tokens of plain decoding, in fewer passes."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from generate_helpers import (
    HOT,
    KEY,
    LENGTHS,
    NEW,
    PROMPT,
    blocks,
    greedy,
    model,
    run,
    stopped,
    stops,
)

from jrope.errors import JropeError
from jrope.generation import run as doors
from jrope.generation import speculate
from jrope.generation.ahead import compile_ahead
from jrope.generation.guesser import Draft, PromptLookup
from jrope.generation.lookup import look_up
from jrope.generation.passes import draw_each
from jrope.generation.past import Past
from jrope.generation.run import generate
from jrope.generation.sample import Sampler
from jrope.model.config import LlamaConfig
from jrope.model.with_rope import with_rope

LOOKUP = PromptLookup(tokens=4)


def guesser(kind: str) -> Any:
    """Prompt lookup; a draft of the model's first layer, or of all of it."""
    _, params, config = model()
    if kind == "lookup":
        return LOOKUP
    if kind == "itself":
        return Draft(params, config, 4)
    first = {**params["model"], "layers": {"0": params["model"]["layers"]["0"]}}
    return Draft({**params, "model": first}, replace(config, num_hidden_layers=1), 4)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Passes of the model over new tokens after each call of the loop."""
    seen: list[int] = []
    inner = speculate.decode_guessing

    def watched(*args: Any, **options: Any) -> Any:
        cache, state = inner(*args, **options)
        seen.append(int(state.passes))
        assert state.rows.lengths.max() <= max(int(args[5]), 1)
        return cache, state

    monkeypatch.setattr(doors, "decode_guessing", watched)
    return seen


CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"sampler": HOT, "key": KEY},
    "penalised": {"sampler": Sampler(repetition_penalty=1.3)},
    "each row its own": {
        "sampler": Sampler(temperature=np.array([0, 0.7, 1.2]), top_k=np.array(9)),
        "key": KEY,
    },
    "changed": {
        "sampler": Sampler(frequency_penalty=0.8, presence_penalty=-0.4),
        "logit_bias": [{3: 4.0, 7: 2.0}, {}, {60: -100, 3: 3.0}],
        "stop_ids": [3],
        "min_new_tokens": 6,
    },
    "one token": {"max_new_tokens": 1},
    "none": {"max_new_tokens": 0},
    "uneven": {"max_new_tokens": 11},
}


@pytest.mark.parametrize("kind", ["lookup", "layer"])
def test_tokens_are_those_of_plain_decoding(kind: str) -> None:
    """Greedy and sampled, with the same log-probabilities."""
    for name, options in CASES.items():
        if kind != "lookup" and name == "each row its own":
            continue  # a program more
        plain = run(logprobs=True, **options)
        guessed = run(logprobs=True, speculate=guesser(kind), **options)
        assert guessed.tokens.tolist() == plain.tokens.tolist(), name
        assert guessed.lengths.tolist() == plain.lengths.tolist(), name
        assert guessed.finite.all(), name
        np.testing.assert_allclose(guessed.logprobs, plain.logprobs, atol=2e-5)
        np.testing.assert_allclose(guessed.prompt_logprobs, plain.prompt_logprobs)


def test_the_distribution_is_that_of_the_sampler() -> None:
    """Pearson's test of the tokens drawn at a guess, and after one that was right."""
    batch, size, guess = 4000, 8, 6  # the likeliest token, and likely after itself
    logits = jax.random.normal(jax.random.key(1), (2, size))
    sampler = Sampler(temperature=0.8, top_k=6)
    weights = np.asarray(jax.nn.softmax(sampler.warp(logits)), np.float64)
    keys = jax.random.split(KEY, batch)
    steps = jnp.zeros(batch, jnp.int32)
    past = Past(seen=jnp.zeros((batch, size), jnp.int32))
    guesses = jnp.full((batch, 1), guess, jnp.int32)
    given = jnp.tile(logits, (batch, 1)), guesses, sampler, keys, steps, past
    drawn = np.asarray(draw_each(*given)[0])
    right = drawn[drawn[:, 0] == guess]
    for tokens, p in ((drawn[:, 0], weights[0]), (right[:, 1], weights[1])):
        found = np.bincount(tokens, minlength=size)
        assert not found[p == 0].any()
        expected = p[p > 0] / p.sum() * len(tokens)
        assert expected.min() > 5
        test = scipy.stats.chisquare(found[p > 0], expected)
        assert test.pvalue > 1e-3


@pytest.mark.parametrize("kind", ["lookup", "layer"])
def test_a_stop_inside_of_right_guesses_ends_the_row_there(kind: str) -> None:
    how = {"logprobs": True, "pad_id": 3, "speculate": guesser(kind)}
    for ids in [stops(), stops()[:1], [int(t) for t in greedy()[:, 0]]]:
        tokens, lengths = stopped(ids, 3)
        out = run(stop_ids=ids, **how)
        assert out.tokens.tolist() == tokens.tolist()
        assert out.lengths.tolist() == lengths
        after = np.arange(NEW) >= np.array(lengths)[:, None]
        assert not np.asarray(out.logprobs)[after].any()


def test_right_guesses_save_passes(passes: list[int]) -> None:
    """A draft that is the model itself is always right, so 5 tokens come of a pass."""
    every = {"logprobs": True, "speculate": guesser("itself")}
    for options in ({}, CASES["sampled"]):
        out = run(**every, **options)
        assert out.tokens.tolist() == run(logprobs=True, **options).tokens.tolist()
    assert passes == [-(-(NEW - 1) // 5)] * 2
    tokens, lengths = stopped(stops(), 3)
    out = run(stop_ids=stops(), pad_id=3, **every)
    assert (out.tokens.tolist(), out.lengths.tolist()) == (tokens.tolist(), lengths)
    out = run(max_new_tokens=14, **every)  # a pass could give more
    assert out.tokens.tolist() == greedy()[:, :14].tolist()
    strong = {"sampler": Sampler(repetition_penalty=3.0)}
    plain = run(logprobs=True, **strong)
    assert run(**every, **strong).tokens.tolist() == plain.tokens.tolist()
    assert plain.tokens.tolist() != greedy().tolist()
    strong = {**CASES["changed"], "min_new_tokens": NEW, "stop_ids": [7]}
    plain = run(logprobs=True, **strong)
    assert run(**every, **strong).tokens.tolist() == plain.tokens.tolist()
    assert plain.lengths.tolist() == [NEW] * 3
    assert passes[-1] == -(-(NEW - 1) // 5)  # what changes logits is the draft's, too


def test_lookup_of_a_model_that_repeats_itself(passes: list[int]) -> None:
    """Embeddings as a head, and layers that add nothing: the last token again."""
    _, params, config = model()
    own = {"weight": params["model"]["embed_tokens"]["weight"]}
    layers = {
        i: {
            **layer,
            "self_attn": {
                **layer["self_attn"],
                "o_proj": {"weight": layer["self_attn"]["o_proj"]["weight"] * 0},
            },
            "mlp": {
                **layer["mlp"],
                "down_proj": {"weight": layer["mlp"]["down_proj"]["weight"] * 0},
            },
        }
        for i, layer in params["model"]["layers"].items()
    }
    same = {**params, "model": {**params["model"], "layers": layers}, "lm_head": own}
    options = {"max_new_tokens": NEW, "stop_ids": [], "logprobs": True}
    out = generate(same, PROMPT, LENGTHS, config=config, speculate=LOOKUP, **options)
    last = PROMPT[np.arange(3), LENGTHS - 1]
    assert out.tokens.tolist() == np.repeat(last[:, None], NEW, axis=1).tolist()
    # Of each row's newest token a guess is known, and right: 1 + 4 tokens a pass.
    assert passes == [-(-(NEW - 1) // 5)]


def test_other_prompts_and_limits_compile_nothing() -> None:
    run(logprobs=True, speculate=LOOKUP)
    before = speculate.decode_guessing._cache_size()
    for options in CASES.values():
        if options.get("max_new_tokens") != 0:
            run(PROMPT[::-1], LENGTHS[::-1], logprobs=True, speculate=LOOKUP, **options)
    grown = speculate.decode_guessing._cache_size() - before
    assert grown <= 2  # a sampler with arrays for each row is another tree, or a bias


def test_streams_of_any_chunk_are_generate() -> None:
    ids = stops()
    tokens, lengths = stopped(ids, 3)
    for chunk in (1, 5, 64):
        how = {"speculate": LOOKUP, "stop_ids": ids, "pad_id": 3}
        joined = np.concatenate(blocks(chunk=chunk, **how), axis=1)
        assert joined.shape[1] == max(lengths)
        assert joined.tolist() == tokens[:, : max(lengths)].tolist()
    joined = np.concatenate(blocks(speculate=LOOKUP, max_new_tokens=11), axis=1)
    assert joined.tolist() == greedy()[:, :11].tolist()


def test_growing_lengths() -> None:
    _, params, config = model("dynamic")
    config = replace(config, rope=replace(config.rope, lengths="growing"))
    prompt = np.tile(PROMPT[:1, :3], (1, 6))
    given = {"config": config, "max_new_tokens": NEW, "stop_ids": []}
    plain = generate(params, prompt, **given)
    guessed = generate(params, prompt, **given, speculate=LOOKUP)
    assert guessed.tokens.tolist() == plain.tokens.tolist()


def test_pieces_of_a_prompt() -> None:
    out = run(prefill_chunk=8, speculate=LOOKUP)
    assert out.tokens.tolist() == greedy().tolist()


def test_compile_ahead_knows_the_programs() -> None:
    _, params, config = model()
    given = {"config": config, "max_new_tokens": NEW}
    found = compile_ahead(params, PROMPT.clip(0), speculate=guesser("layer"), **given)
    wanted = {"prefill", "first_token", "draft_prefill", "begin", "decode_guessing"}
    assert {*found} == wanted


# --- what is looked up


def looked_up(text: list[int], **how: int) -> list[int]:
    row = jnp.asarray([text + [0] * 5], jnp.int32)
    newest = jnp.asarray([len(text) - 1])
    return look_up(row, newest, PromptLookup(**how))[0].tolist()


def test_the_longest_match_counts_and_then_the_last() -> None:
    text = [1, 2, 3, 7, 8, 9, 3, 4, 5, 1, 2, 3]
    assert looked_up(text, tokens=2) == [7, 8]
    assert looked_up(text, tokens=2, max_ngram=1) == [4, 5]
    assert looked_up([5, 6, 1, 5, 7, 2, 5], tokens=1) == [7]
    assert looked_up([1, 2, 3], tokens=2) == [-1, -1]
    assert looked_up([0], tokens=2) == [-1, -1]  # not the zeros behind it


def test_past_its_end_the_text_goes_round() -> None:
    assert looked_up([9, 4, 4], tokens=3) == [4, 4, 4]
    assert looked_up([1, 2, 1, 2], tokens=5) == [1, 2, 1, 2, 1]


# --- refusals


def refusal(config: LlamaConfig | None = None, **options: Any) -> str:
    _, params, own = model()
    with pytest.raises(JropeError) as error:
        generate(params, [[1, 2]], config=config or own, **options)
    return str(error.value)


def test_refusals() -> None:
    _, params, config = model()
    assert "got a str, want a PromptLookup or Draft" in refusal(speculate="prompt")
    other = replace(config, vocab_size=62)
    told = refusal(speculate=Draft(params, other))
    assert "the draft has a vocabulary of 62, the model one of 61" in told
    rope = with_rope(config, "dynamic", factor=2, lengths="hf")
    assert '"hf" lengths' in refusal(rope, speculate=LOOKUP)
    windows = (8,) + (None,) * (config.num_hidden_layers - 1)
    windowed = replace(config, windows=windows)
    assert "a window of 8" in refusal(windowed, speculate=LOOKUP)
    assert "params: got" in refusal(speculate=Draft({}, config))
    for wrong in ({"tokens": 0}, {"max_ngram": 0}):
        with pytest.raises(JropeError, match=f"PromptLookup: {next(iter(wrong))}"):
            PromptLookup(**wrong)
    with pytest.raises(JropeError, match="Draft: tokens"):
        Draft(params, config, 0)
