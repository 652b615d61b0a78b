"""Drafts: the same tokens in fewer passes, whatever is drafted."""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache, RotatingKVCache
from mlx_lm.models.llama import Model as Llama
from mlx_lm.models.llama import ModelArgs
from PIL import Image

from llama3v_mlx import generate, stream_generate
from llama3v_mlx.checkpoint import CheckpointError
from llama3v_mlx.conversation import Conversation
from llama3v_mlx.demo import IMAGES
from llama3v_mlx.drafting import budget, verify
from llama3v_mlx.drafting.budget import Budget
from llama3v_mlx.drafting.draft_model import DraftModel, load_draft_model
from llama3v_mlx.drafting.drafters import Forced, NGrams
from llama3v_mlx.drafting.verify import drafted_steps
from llama3v_mlx.generation import statistics
from llama3v_mlx.sampling import Sampler, Sampling

QUESTION = "What is this image?"
ANSWER = "Three blue circles on a white background."
GREEDY = {"temperature": 0, "repetition_penalty": 1}


def frozen() -> float:
    """Clock of a machine on which every pass takes no time, so that drafting depends on acceptance alone."""
    return 0.0


def asked_again(image: Image.Image) -> list[dict]:
    """A conversation in which the answer has been given before."""
    return [
        {"role": "user", "content": [image, QUESTION]},
        {"role": "assistant", "content": ANSWER},
        {"role": "user", "content": QUESTION},
    ]


@pytest.fixture(scope="module")
def prompt(demo, circles: Image.Image):
    """The prompt of `asked_again`."""
    return demo[1].encode(asked_again(circles))


def run(demo, prompt, **options) -> tuple[list[int], int, str]:
    """The tokens of an answer, its passes through Llama, and why it ended."""
    responses = list(stream_generate(*demo, prompt, **GREEDY | options))
    return [each.token for each in responses], responses[-1].passes, responses[-1].finish_reason


def both(demo, prompt, **options) -> tuple[tuple, tuple]:
    return run(demo, prompt, draft=None, **options), run(demo, prompt, clock=frozen, **options)


# The same tokens


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kv_bits": 8, "quantized_kv_start": 0},
        {"repetition_penalty": 1.2},
        {"logits_processors": [lambda tokens, logits: logits.at[:, tokens[-1:]].add(3.0)]},
    ],
)
def test_a_repeated_answer_takes_fewer_passes(demo, prompt, options: dict) -> None:
    (tokens, passes, reason), (drafted, fewer, ended) = both(demo, prompt, **options)
    assert (drafted, ended) == (tokens, reason)
    assert passes == len(tokens)
    assert fewer < passes


@pytest.mark.parametrize("most", range(1, 10))
def test_max_tokens_may_end_an_answer_inside_a_block(demo, prompt, most: int) -> None:
    (tokens, _, reason), (drafted, passes, ended) = both(demo, prompt, max_tokens=most)
    assert (drafted, ended) == (tokens, reason)
    assert passes <= most


def test_a_block_ends_with_the_context(demo, prompt, monkeypatch: pytest.MonkeyPatch) -> None:
    model = demo[0]
    context = len(prompt.ids) + 6
    monkeypatch.setattr(model.language_model.args, "max_position_embeddings", context)
    longest = 0
    call = KVCache.update_and_fetch

    def update(self, keys, values):
        nonlocal longest
        longest = max(longest, self.offset + keys.shape[2])
        return call(self, keys, values)

    monkeypatch.setattr(KVCache, "update_and_fetch", update)
    (tokens, _, reason), (drafted, _, ended) = both(demo, prompt, max_tokens=-1)
    assert (drafted, ended, len(drafted)) == (tokens, "length", 6) and reason == "length"
    assert longest <= context


@pytest.mark.parametrize("ahead", range(1, 9))
def test_no_block_crosses_the_start_of_the_quantized_cache(
    demo, prompt, ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every token's keys are read in the precision they have without drafts: up to the start, float32."""
    start = len(prompt.ids) + ahead
    call = KVCache.update_and_fetch
    ends = set()

    def update(self, keys, values):
        ends.add(self.offset + keys.shape[2])
        return call(self, keys, values)

    monkeypatch.setattr(KVCache, "update_and_fetch", update)
    tokens, fewer, _ = run(demo, prompt, clock=frozen, kv_bits=4, quantized_kv_start=start)
    assert max(ends) == start
    assert tokens == run(demo, prompt, draft=None, kv_bits=4, quantized_kv_start=start)[0]
    assert fewer < len(tokens)


def test_nothing_is_drafted_after_the_end_of_an_answer(demo, prompt) -> None:
    seen = []

    class Spy(NGrams):
        def draft(self, most: int) -> list[int]:
            seen.append(super().draft(most))
            return seen[-1]

    model, processor = demo
    embeddings = model.embed_inputs(mx.array(prompt.ids), prompt.images)
    ends = processor.tokenizer.eos_token_ids
    blocks = []
    call = type(model).__call__

    def forward(self, inputs, cache=None, input_embeddings=None):
        blocks.append(inputs[0].tolist())
        return call(self, inputs, cache, input_embeddings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "__call__", forward)
        patch.setattr(budget, "START", 4)  # so that the end is in the midst of the second draft
        spy = Spy(processor.prompt_tokens.image)
        steps = drafted_steps(mx.array(prompt.ids), model, [spy], eos=ends, input_embeddings=embeddings, clock=frozen)
        token = next(step.token for step in steps if step.token in ends)
    assert any(token in tokens[:-1] for tokens in seen)
    assert not any(token in block[:-1] for block in blocks[1:])


def test_progress_is_reported_as_by_mlx_lm(demo, prompt) -> None:
    reports: tuple[list, list] = ([], [])
    for calls, draft in zip(reports, (None, "auto"), strict=True):
        options = {"prompt_progress_callback": lambda *done, calls=calls: calls.append(done), "prefill_step_size": 50}
        run(demo, prompt, draft=draft, max_tokens=2, **options)
    assert reports[0] == reports[1] != []


@pytest.mark.parametrize("temperature", [1.5, 3.0])
def test_the_same_seed_draws_the_same_tokens(demo, prompt, temperature: float, small: DraftModel, monkeypatch) -> None:
    """How many tokens are drafted at once depends on the time that blocks take; the answer does not."""
    answers, passes = [], []
    for options, most in (({"draft": None}, 1), ({}, 7), ({"draft_model": small}, 7), ({"draft_model": small}, 1)):
        mx.random.seed(11)
        monkeypatch.setattr(budget, "MOST", most)
        monkeypatch.setattr(budget, "START", min(2, most))
        options = options | {"temperature": temperature, "top_p": 0.95, "max_tokens": 24}
        responses = list(stream_generate(*demo, prompt, **options, **({} if "draft" in options else {"clock": frozen})))
        answers.append([response.token for response in responses])
        passes.append(responses[-1].passes)
    assert answers[1:] == answers[:1] * 3
    assert passes[0] == len(answers[0]) > passes[3] >= passes[2]


def test_an_empty_history(demo) -> None:
    tokens, passes, _ = run(demo, "Hello", clock=frozen)
    assert tokens == run(demo, "Hello", draft=None)[0]
    assert passes <= len(tokens)


@pytest.mark.parametrize("options", [{"max_kv_size": 512}, {"prompt_cache": [RotatingKVCache(512) for _ in range(3)]}])
def test_a_rotating_cache_is_left_alone(demo, prompt, options: dict, llama: Path) -> None:
    tokens, passes, _ = run(demo, prompt, **options)
    assert (tokens, passes) == (run(demo, prompt, draft=None)[0], len(tokens))
    with pytest.raises(ValueError, match="a draft model needs a cache from which tokens can be removed"):
        run(demo, prompt, draft_model=llama, **options)


# Logits that rounding decides: a Markov chain as the model


class Chain:
    """Model whose logits depend on the last token alone; `rounding` is added to those of blocks."""

    def __init__(self, logits: np.ndarray, rounding: float = 0.0):
        self.logits = mx.array(logits.astype(np.float32))
        self.rounding = rounding * mx.array(np.arange(len(logits)), mx.float32)
        self.blocks: list[int] = []

    def make_cache(self) -> list[KVCache]:
        return [KVCache()]

    layers = (None,)

    def __call__(self, tokens: mx.array, cache=None, input_embeddings=None) -> mx.array:
        self.blocks.append(tokens.shape[1])
        nothing = mx.zeros((1, 1, tokens.shape[1], 1))
        cache[0].update_and_fetch(nothing, nothing)
        logits = self.logits[tokens]
        return logits + self.rounding if tokens.shape[1] > 1 else logits


class Always(NGrams):
    """Drafter that drafts at every place what `draft` says."""

    waits = True

    def __init__(self, draft: Callable[[int, int], list[int]]):
        self._draft = draft
        super().__init__(-1)

    def is_likely(self) -> bool:
        return True

    def draft(self, most: int) -> list[int]:
        return self._draft(self._tokens[-1], most)


def follow(chain: Chain, count: int, drafter, **options) -> list[int]:
    steps = drafted_steps(mx.array([0]), chain, [drafter] if drafter else [], max_tokens=count, clock=frozen, **options)
    return [step.token for step in steps]


@pytest.mark.parametrize("processed", [False, True])
def test_ties_are_decided_by_a_pass_of_one_token(processed: bool) -> None:
    """In a block, rounding favours the later one of two equally likely tokens."""
    logits = np.full((6, 6), -9.0)
    logits[np.arange(6), (np.arange(6) + 1) % 6] = 4
    logits[3, 5] = logits[3, 4]
    expected = follow(Chain(logits), 30, None)
    assert 5 not in [after for before, after in zip(expected, expected[1:], strict=False) if before == 3]
    chain = Chain(logits, rounding=1e-6)
    guess = Always(lambda last, most: [(last + i) % 6 for i in range(1, most + 1)])
    seen: list[list[int]] = []
    processors = [lambda tokens, logits: seen.append(tokens.tolist()) or logits] if processed else []
    assert follow(chain, 30, guess, logits_processors=processors) == expected
    assert max(chain.blocks) > 1 and len(chain.blocks) < 30
    assert all(tokens == [0, *expected][: len(tokens)] for tokens in seen)


def test_random_ties_are_decided_by_a_pass_of_one_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a seed draws the same tokens where blocks round otherwise."""
    monkeypatch.setitem(verify.CLOSE, mx.float32, 0.05)
    logits = np.random.default_rng(0).normal(size=(20, 20)) * 2
    answers = []
    for chain in (Chain(logits), Chain(logits, rounding=0.005)):
        guess = Always(lambda last, most: [int(logits[last].argmax())] * min(most, 1)) if answers else None
        answers.append(follow(chain, 300, guess, sampler=Sampling(0.7, 1.0, 0).sampler(mx.random.key(5))))
    assert answers[0] == answers[1]
    assert chain.blocks.count(2) > 20


def test_a_wrong_drafter_changes_nothing_and_is_given_up() -> None:
    logits = np.random.default_rng(0).normal(size=(50, 50)) * 3
    expected = follow(Chain(logits), 1000, None)
    chain = Chain(logits)
    wrong = Always(lambda last, most: [(int(logits[last].argmax()) + 1) % 50] * most)
    steps = drafted_steps(mx.array([0]), chain, [wrong], max_tokens=1000, clock=counting(chain, 0.77))
    assert [step.token for step in steps] == expected
    assert sum(1 + 0.77 * (length - 1) for length in chain.blocks) <= 1.02 * 1000 + budget.GRANT + budget.START


def counting(chain: Chain, each: float) -> Callable[[], float]:
    """Clock of a machine on which every further token of a block costs `each` of a pass."""
    return lambda: sum(1 + each * (length - 1) for length in chain.blocks)


def test_drafting_stops_where_blocks_cost_more_than_they_save() -> None:
    """As with quantized weights on a CPU, where a block takes as long as its tokens singly."""
    logits = np.full((6, 6), -9.0)
    logits[np.arange(6), (np.arange(6) + 1) % 6] = 4
    half = Always(lambda last, most: [(last + 1) % 6, *[last] * (most - 1)])
    chains = {}
    for each in (0.1, 1.0):
        chains[each] = chain = Chain(logits)
        list(drafted_steps(mx.array([0]), chain, [half], max_tokens=600, clock=counting(chain, each)))
    assert len(chains[0.1].blocks) < 400
    assert counting(chains[1.0], 1.0)() < 1.02 * 600 + budget.GRANT + budget.START


# The same distribution


def chi_square(counts: np.ndarray, probs: np.ndarray) -> float:
    """Pearson's statistic in standard deviations above its mean; rare outcomes are pooled."""
    expected = probs * counts.sum()
    rare = expected < 5
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    kept = expected > 0
    assert counts[~kept].sum() == 0, "an impossible token was drawn"
    freedom = max(1, kept.sum() - 1)
    return ((((counts - expected) ** 2)[kept] / expected[kept]).sum() - freedom) / math.sqrt(2 * freedom)


LIMIT = 4.0  # standard deviations: with the seeds below, values from -1 to 2


def distribution(sampling: Sampling, logits: mx.array) -> mx.array:
    """Probabilities (1, vocab_size) that are left by the filters, whose order and effect test_generation.py checks."""
    tokens, filtered = sampling.filter(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    probs = mx.softmax(filtered, axis=-1)
    return probs if tokens is None else mx.put_along_axis(mx.zeros(logits.shape), tokens, probs, axis=-1)


@pytest.mark.parametrize(
    "sampling",
    [Sampling(1.0, 1.0, 0, 0.0), Sampling(0.7, 0.8, 100, 0.0), Sampling(1.5, 0.95, 0, 0.05), Sampling(2.0, 1.0, 20, 0)],
)
def test_what_is_drawn_has_the_distribution(demo, prompt, sampling: Sampling) -> None:
    """And a Llama that has not seen the image mostly draws the same token from the same random numbers."""
    model, processor = demo
    ids = mx.array(processor.encode("How many shapes are there?").ids)
    logits = {
        "model": model(ids[None], input_embeddings=model.embed_inputs(mx.array(prompt.ids), prompt.images)[None]),
        "draft": model(ids[None]),
    }
    rows = {name: (each[:, -1] - mx.logsumexp(each[:, -1])) / 4 for name, each in logits.items()}  # less certain
    draws, tokens = 4_000, {}
    for name, row in rows.items():
        mx.random.seed(1)
        tokens[name] = np.array(sampling.sampler()(mx.broadcast_to(row - mx.logsumexp(row), (draws, row.shape[1]))))
        probs = np.array(distribution(sampling, row)[0], np.float64)
        assert chi_square(np.bincount(tokens[name], minlength=len(probs)), probs) < LIMIT
    apart = mx.abs(distribution(sampling, rows["model"]) - distribution(sampling, rows["draft"])).sum().item() / 2
    assert apart > 0.05
    assert (tokens["model"] == tokens["draft"]).mean() > (1 - apart) / (1 + apart) - 0.02


@pytest.mark.parametrize("at_random", [False, True])
def test_an_answer_of_blocks_has_the_distribution(at_random: bool) -> None:
    """Transitions of a Markov chain, followed with drafts that are drawn with the same random numbers or certain."""
    logits, drafts = np.random.default_rng(3).normal(size=(2, 5, 5)).astype(np.float32)
    drafts = logits + drafts / 4
    sampling = Sampling(0.9, 0.95, 4, 0.01)

    answers, chains = [], []
    for drafting in (False, True):
        sampler = sampling.sampler(mx.random.key(2))

        def draft(last: int, most: int, sampler: Sampler = sampler) -> list[int]:
            draw = sampler.copy()
            tokens = [last]
            for _ in range(most):
                row = mx.array(drafts[tokens[-1]][None])
                tokens.append((draw(row - mx.logsumexp(row)) if at_random else mx.argmax(row, axis=-1)).item())
            return tokens[1:]

        chains.append(Chain(logits))
        answers.append([0, *follow(chains[-1], 1000, Always(draft) if drafting else None, sampler=sampler)])
    assert answers[0] == answers[1]
    assert max(chains[1].blocks) > 2 and len(chains[1].blocks) < (500 if at_random else 900)
    counts = np.zeros((5, 5))
    np.add.at(counts, (answers[1][:-1], answers[1][1:]), 1)
    for state in range(5):
        probs = distribution(sampling, mx.array(logits[state : state + 1]))
        assert chi_square(counts[state], np.array(probs)[0]) < LIMIT


# Drafters


def test_ngrams_draft_what_followed() -> None:
    drafter = NGrams(placeholder=0)
    assert not drafter.is_likely() and drafter.draft(4) == []
    drafter.see([1, 2, 3, 4, 5, 6, 9, 2, 3])
    assert drafter.is_likely() and drafter.draft(4) == []  # two tokens are not enough
    drafter.see([4])
    assert drafter.draft(2) == [5, 6]
    assert drafter.draft(9) == [5, 6, 9, 2, 3, 4, 5, 6, 9]  # and so on, as after each repetition
    drafter.begin()
    assert drafter.draft(4) == []


def test_ngrams_prefer_the_longest_match_then_the_latest() -> None:
    drafter = NGrams(placeholder=0)
    drafter.see([8, 1, 2, 3, 50, 9, 1, 2, 3, 60, 9, 1, 2, 3, 70, 7, 7, 8, 1, 2, 3])
    assert drafter.draft(1) == [50]
    drafter.see([9, 1, 2, 3])
    assert drafter.draft(1) == [70]


def test_images_match_nothing() -> None:
    image = [0] * 9
    drafter = NGrams(placeholder=0)
    drafter.see([*image, 1, 2, 3, *image, 4, *image])
    assert not drafter.is_likely() and drafter.draft(4) == []
    drafter.see([1, 2, 3])
    assert drafter.draft(4) == []  # an image followed
    drafter.see([5, 1, 2, 3])
    assert drafter.draft(1) == [5]


def test_what_a_schema_forces_is_drafted() -> None:
    class Matcher:
        """Matcher of "1 2 3 4", then anything."""

        def __init__(self, consumed: Sequence[int] = ()):
            self.consumed = list(consumed)

        def deep_copy(self) -> "Matcher":
            return Matcher(self.consumed)

        def consume_tokens(self, tokens: list[int]) -> bool:
            self.consumed += tokens
            return True

        def is_stopped(self) -> bool:
            return False

        def compute_ff_tokens(self) -> list[int]:
            return [1, 2, 3, 4][len(self.consumed) :]

    drafter = Forced(Matcher(), num_prompt_tokens=3)
    drafter.see([7, 7, 7])
    assert drafter.draft(3) == [1, 2, 3]
    drafter.see([1, 2])
    assert drafter.draft(7) == [3, 4]


def test_budget() -> None:
    """Nothing accepted costs 2 % of a long answer; drafts that are accepted grow, up to a block of eight."""
    account, lost = Budget(), 0.0
    for _ in range(10_000):
        account.single()
        if length := account.room():
            account.verified(length, 1, 1 + length)
            lost += length
    assert lost <= 0.02 * 10_000 + budget.GRANT + budget.START
    account, lengths = Budget(), []
    for _ in range(4):
        lengths.append(account.room())
        account.verified(lengths[-1], lengths[-1] + 1, 1.3)
    assert lengths == [2, 4, 7, 7]
    for _ in range(100):
        account.waited()
    assert account.room() == 0


# A draft model


@pytest.fixture(scope="module")
def small(demo, llama: Path) -> DraftModel:
    return load_draft_model(llama, demo[1], 512)


@pytest.mark.parametrize("options", [{}, {"kv_bits": 8, "quantized_kv_start": 0}])
def test_a_draft_model(demo, prompt, circles: Image.Image, small: DraftModel, options: dict) -> None:
    """The demo's own Llama, blind; of text it drafts every token right."""
    questions = (prompt, demo[1].encode("Who are you?"), demo[1].encode(QUESTION, [circles]))
    for question in questions:
        tokens, passes, _ = run(demo, question, draft=None, **options)
        drafted, fewer, _ = run(demo, question, draft_model=small, clock=frozen, **options)
        assert drafted == tokens
        assert fewer <= passes
    text = questions[1]
    tokens, passes, _ = run(demo, text, draft=None, draft_model=small, clock=frozen)
    assert passes <= 1 + 2 + math.ceil(len(tokens) / (budget.MOST + 1))


def test_a_draft_model_follows_a_conversation(demo, small: DraftModel) -> None:
    """Its cache is kept, and trimmed where the conversation was undone."""
    talks = [Conversation(*demo, options=GREEDY | each) for each in ({"draft": None}, {"draft_model": small})]
    for image, question, undone in (
        (IMAGES / "two-red-stars.jpg", QUESTION, False),
        (None, "What color is the background?", True),
        (None, "Which shape is it?", False),
        (None, QUESTION, False),
    ):
        answers = [[each.text for each in talk.ask(question, [image] if image else [])] for talk in talks]
        assert "".join(answers[0]) == "".join(answers[1])
        if undone:
            assert [talk.undo().text for talk in talks] == [question] * 2
    assert talks[0].ids == talks[1].ids


def test_draft_models_that_cannot_be_used(demo, llama: Path, tiny: Path, tmp_path: Path, run_main) -> None:
    model, processor = demo
    with pytest.raises(CheckpointError, match="has another vocabulary \\(512 tokens\\) than the model \\(600\\)"):
        load_draft_model(llama, processor, 600)
    with pytest.raises(CheckpointError, match="model_type is 'llama3v'; a draft model is a llama"):
        load_draft_model(tiny, processor, 512)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (tmp_path / name).write_bytes((llama / name).read_bytes())
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["red"], vocabulary["blue"] = vocabulary.get("blue", 1), vocabulary.get("red", 0)
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    done = run_main("llama3v_mlx.generate", "-p", "Hello", "--draft-model", tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert "error: " in done.stderr and "another vocabulary" in done.stderr
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer.json"):
        load_draft_model(tmp_path, processor, 512)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ([1], "config.json: quantization"),
        ({"bits": 4}, "config.json: quantization"),
        ({"group_size": 32, "bits": 7}, "config.json: quantization.bits is 7"),
        ({"group_size": 32, "bits": 4, "model.embed_tokens": {"bits": "x"}}, "quantization.model.embed_tokens"),
        ({"group_size": 32, "bits": 8, "mode": "mxfp4"}, "config.json: "),
        ({"group_size": 32, "bits": 4}, None),
    ],
)
def test_a_quantized_draft_model(demo, llama: Path, tmp_path: Path, quantization, message: str | None) -> None:
    config = json.loads((llama / "config.json").read_text()) | {"quantization": quantization}
    model = Llama(ModelArgs.from_dict(config))
    model.load_weights(str(llama / "model.safetensors"))
    nn.quantize(model, 32, 4)
    mx.save_safetensors(str(tmp_path / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").write_bytes((llama / "tokenizer.json").read_bytes())
    if message is not None:
        with pytest.raises(CheckpointError, match=message):
            load_draft_model(tmp_path, demo[1], 512)
        return
    tokens, passes, _ = run(demo, "Who are you?", draft=None)
    drafted, fewer, _ = run(
        demo, "Who are you?", draft=None, draft_model=load_draft_model(tmp_path, demo[1], 512), clock=frozen
    )
    assert (drafted, fewer < passes) == (tokens, True)


def random_llama(vocab_size: int, context: int) -> Llama:
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    shape |= {"rms_norm_eps": 1e-5, "vocab_size": vocab_size, "max_position_embeddings": context}
    return Llama(ModelArgs(model_type="llama", **shape))


def test_a_draft_model_computes_no_logits_of_the_prompt() -> None:
    model = random_llama(60_000, 8192)
    mx.eval(model.parameters())
    drafter = DraftModel(model, placeholder=0)
    drafter.see([1] * 400)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    assert len(drafter.draft(1)) == 1
    assert mx.get_peak_memory() - before < 400 * 60_000  # a quarter of their size


def test_beyond_its_context_a_draft_model_is_not_waited_for() -> None:
    drafter = DraftModel(random_llama(6, 40), placeholder=-1)
    drafter.see([1] * (40 - budget.MOST))
    assert drafter.is_likely() and len(drafter.draft(budget.MOST)) == budget.MOST
    drafter.see([1])
    assert not drafter.is_likely() and drafter.draft(1) == []


# The commands, and chat


def test_passes_are_reported(demo, prompt, run_main, picture: Path) -> None:
    *_, last = stream_generate(*demo, prompt, **GREEDY, clock=frozen)
    assert f"tokens-per-sec ({last.passes} passes)\n" in statistics(last)
    plain = dataclasses.replace(last, passes=last.generation_tokens)
    assert "passes" not in statistics(plain)
    done = run_main("llama3v_mlx.generate", "--image", picture, "--temp", "0", "--json", "--no-draft")
    figures = json.loads(done.stdout)
    assert figures["passes"] == figures["generation_tokens"]


def test_chat_drafts_from_earlier_answers(demo) -> None:
    talk = Conversation(*demo, options=GREEDY | {"clock": frozen})
    answers = [list(talk.ask(QUESTION, [IMAGES / "two-red-stars.jpg"][i:])) for i in range(2)]
    first, second = ("".join(each.text for each in answer) for answer in answers)
    assert first == second
    assert answers[0][-1].passes == answers[0][-1].generation_tokens > 2 * answers[1][-1].passes


def test_stopping_inside_a_block(demo) -> None:
    """The tokens that were shown are kept, and no more."""
    expected = Conversation(*demo, options=GREEDY | {"draft": None})
    talk = Conversation(*demo, options=GREEDY | {"clock": frozen})
    for each in (expected, talk):
        list(each.ask(QUESTION, [IMAGES / "two-red-stars.jpg"]))
        stream = each.ask(QUESTION)
        for _ in range(5):
            next(stream)
        stream.close()
    assert talk.ids == expected.ids
    assert "".join(r.text for r in talk.ask(QUESTION)) == "".join(r.text for r in expected.ask(QUESTION))


@pytest.mark.parametrize(("call", "inside"), [(2, False), (8, False), (9, True)])
def test_ctrl_c_in_the_middle_of_a_pass(demo, call: int, inside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some layers have read the token, others have not; what follows is as if the answer had been stopped there."""
    talk = Conversation(*demo, options=GREEDY | {"clock": frozen})
    list(talk.ask(QUESTION, [IMAGES / "two-red-stars.jpg"]))
    calls, update = 0, KVCache.update_and_fetch

    def interrupted(self, keys, values):
        nonlocal calls
        calls += 1
        if calls == call:
            self.offset += keys.shape[2] * inside  # the cache has grown, but not been written
            raise KeyboardInterrupt
        return update(self, keys, values)

    with monkeypatch.context() as patch:
        patch.setattr(KVCache, "update_and_fetch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(talk.ask(QUESTION))
    assert len({cache.offset for cache in talk._cache}) == 1
    fresh = Conversation(*demo, options=GREEDY | {"draft": None})
    list(fresh.ask(QUESTION, [IMAGES / "two-red-stars.jpg"]))
    if len(talk.turns) > 1:
        stream = fresh.ask(QUESTION)
        for _ in range(len(talk.ids) - talk.turns[1].start - talk.turns[1].num_tokens):
            next(stream)
        stream.close()
    assert talk.ids == fresh.ids
    for each in (talk, fresh):
        list(each.ask("Which shape is it?"))
    assert talk.ids == fresh.ids
    for ours, theirs in zip(talk._cache, fresh._cache, strict=True):
        for x, y in zip(ours.keys_and_values(), theirs.keys_and_values(), strict=True):
            assert mx.allclose(x[:, :, : len(talk.ids) - 1], y[:, :, : len(talk.ids) - 1], atol=1e-4)


SCHEMA = {
    "type": "object",
    "properties": {"color": {"enum": ["red", "blue"]}, "background_color": {"enum": ["white", "yellow"]}},
    "required": ["color", "background_color"],
    "additionalProperties": False,
}


def test_an_answer_keeps_to_a_schema(demo, circles: Image.Image, tmp_path: Path, run_main, picture: Path) -> None:
    pytest.importorskip("llguidance")
    prompt = demo[1].encode(QUESTION, [circles])
    (tokens, _, reason), (drafted, passes, ended) = both(demo, prompt, schema=SCHEMA, max_tokens=60)
    assert (drafted, ended) == (tokens, reason) == (tokens, "stop")
    assert passes < len(tokens) / 2
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    done = run_main("llama3v_mlx.generate", "--image", picture, "--schema", tmp_path / "schema.json", "--no-verbose")
    assert json.loads(done.stdout).keys() == SCHEMA["properties"].keys()
    sampled = []
    for draft in (None, "auto"):
        mx.random.seed(5)
        options = {"draft": draft} | ({"clock": frozen} if draft else {})
        sampled.append(generate(*demo, prompt, schema=SCHEMA, temperature=3.0, top_p=1, **options))
    assert sampled[0] == sampled[1]


@pytest.mark.parametrize("text", ["Hi!", "<|eot_id|>", "an <image> of 2"])
def test_a_schema_may_force_any_text(demo, text: str) -> None:
    """Also the names of special tokens, which the tokenizer would encode as such."""
    pytest.importorskip("llguidance")
    for options in ({"draft": None}, {"clock": frozen}):
        answer = generate(*demo, "Hello", schema={"const": text}, max_tokens=40, **GREEDY, **options)
        assert json.loads(answer) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "is not a JSON object"),
        ('{"type": "no"}', "JSON schema"),
        ('{"$ref": "#"}', "no answer satisfies it"),
        ('{"$ref": "file:///etc/hostname"}', "does not fetch resources"),
        ('{"$ref": "http://127.0.0.1:1/"}', "does not fetch resources"),
        (json.dumps({"enum": ["x" * 70_000]}), "has over 65,536 characters"),
    ],
)
def test_a_schema_that_cannot_be_used(run_main, tmp_path: Path, text: str, message: str) -> None:
    if "$ref" in text or "enum" in text:
        pytest.importorskip("llguidance")
    (tmp_path / "schema.json").write_text(text)
    done = run_main("llama3v_mlx.generate", "-p", "Hello", "--schema", tmp_path / "schema.json")
    assert done.returncode == 1 and done.stdout == ""
    assert message in done.stderr and done.stderr.count("error: ") == 1
