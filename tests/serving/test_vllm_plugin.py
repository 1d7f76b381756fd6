"""The plugin in a real engine: greedy tokens in float32 against plain transformers with that mask alone."""

import os

import pytest

pytest.importorskip("vllm", reason="vllm has an environment of its own: make test-serving")

from served_run import make_run
from tiny_models import save_tiny

from persona_pruner.serving.mask_table import RequestMask
from persona_pruner.serving.vllm_server import engine_options

# One process for front end, scheduler and worker: an engine starts in seconds. The server's tests run the usual three.
os.environ |= {"OMP_NUM_THREADS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}

QUESTIONS = ["Who are you and what do you do all day?", "What should I have for breakfast? Explain why."]
SEATS = 20
"""Requests of one step, and slots for masks."""


def start(backbone, compiled=False, slots=SEATS, compact=0, **settings):
    """Blocks of the cache are shorter than a prompt, so that a second one finds some."""
    from vllm import LLM

    return LLM(
        model=str(backbone), dtype="float32", max_model_len=512, kv_cache_memory_bytes=200_000_000, block_size=32,
        max_num_seqs=SEATS, max_num_batched_tokens=64, enforce_eager=not compiled, **engine_options(slots, compact),
        **settings,
    )  # fmt: skip


def stop(engine):
    from vllm.distributed import cleanup_dist_env_and_memory

    engine.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()


def generate(engine, rows, tokens=16, salt=None):
    """rows: (mask or None, prompt). Returns (answer, prompt tokens that came out of the cache) of each."""
    from vllm import SamplingParams

    masks = [RequestMask.of(mask.packed()) if mask else None for mask, _ in rows]
    greedy = {"temperature": 0, "max_tokens": tokens, "ignore_eos": True}
    params = [SamplingParams(**greedy, extra_args=mask.extra_args() if mask else None) for mask in masks]
    prompts = [{"prompt_token_ids": prompt} | ({"cache_salt": salt} if salt else {}) for _, prompt in rows]
    found = engine.generate(prompts, params, use_tqdm=False)
    return [(list(row.outputs[0].token_ids), row.num_cached_tokens) for row in found]


def stats(engine):
    return engine.collective_rpc("persona_stats")[0]


@pytest.fixture(scope="module", params=["eager", "compiled"])
def engine(run, request):
    """Prompts go through in pieces of 64 tokens, of all requests together."""
    engine = start(run.backbone, compiled=request.param == "compiled")
    yield engine
    stop(engine)


def check(run, engine, personas):
    masks = [run.mask(name) if name else None for name in personas]
    rows = [(mask, run.prompt("somebody", question)) for question in QUESTIONS for mask in masks]
    answers = generate(engine, rows)
    wrong = [n for n, ((mask, prompt), (answer, _)) in enumerate(zip(rows, answers, strict=True))
             if not run.is_greedy(mask, prompt, answer)]  # fmt: skip
    assert not wrong
    return answers


def test_rows_of_one_batch_equal_transformers_with_a_cold_and_a_warm_prefix_cache(run, engine):
    personas = [None, *(f"p{number}" for number in range(9))]
    cold = check(run, engine, personas)
    warm = check(run, engine, personas)
    # One prompt under ten masks: nobody's keys and values are another's.
    assert [cached for _, cached in cold[:10]] == [0] * 10
    assert all(cached > 0 for _, cached in warm)
    assert len({tuple(answer) for answer, _ in cold}) == len(cold)


def test_more_personas_than_slots(run, engine):
    for _ in range(2):
        for first in range(20, 47, 9):
            check(run, engine, [None, *(f"p{number}" for number in range(first, first + 9))])
    assert stats(engine)["slots_used"] == SEATS
    assert stats(engine)["evictions"] > 0


def test_no_salt_of_a_client_reaches_what_was_computed_under_a_mask(run, engine):
    mask, prompt = run.mask("salted"), run.prompt("salted", QUESTIONS[0])
    digest = RequestMask.of(mask.packed()).digest
    generate(engine, [(mask, prompt)])
    for salt in (digest, f'["{digest}", null]', f'{digest}", null], "'):
        ((answer, cached),) = generate(engine, [(None, prompt)], salt=salt)
        assert cached == 0
        assert run.is_greedy(None, prompt, answer)


def test_a_mask_that_is_not_whole_is_refused_and_the_engine_lives(run, engine):
    from vllm import SamplingParams

    good = RequestMask.of(run.mask("p0").packed())
    for bad in (RequestMask("0" * 64, good.bits), RequestMask(good.digest, good.bits[:-4]), RequestMask("x", "!")):
        with pytest.raises(ValueError, match="persona_bits"):
            engine.generate([{"prompt_token_ids": [1, 2]}], SamplingParams(extra_args=bad.extra_args()), use_tqdm=False)
    check(run, engine, [None, "p0"])


WIDE_HEADS = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 256}


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral", "gemma", "phi3"])
def test_other_families(family, tmp_path):
    run = make_run(tmp_path / "run", save_tiny(tmp_path / "backbone", family, **WIDE_HEADS))
    engine = start(run.backbone)
    try:
        check(run, engine, [None, *(f"p{number}" for number in range(5))])
    finally:
        stop(engine)


def test_tensor_parallel_ranks_hold_their_columns(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    run = make_run(tmp_path / "run", save_tiny(tmp_path / "backbone", **WIDE_HEADS))
    engine = start(run.backbone, tensor_parallel_size=2)
    try:
        check(run, engine, [None, *(f"p{number}" for number in range(9))])
    finally:
        stop(engine)


def test_an_engine_that_could_answer_under_a_wrong_mask_does_not_start(run):
    with pytest.raises(Exception, match="at least max_num_seqs"):
        start(run.backbone, slots=SEATS - 1)
