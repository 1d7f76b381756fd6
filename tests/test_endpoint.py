import asyncio

import http_faults as faults
import pytest
from judge_server import judge_server

from persona_pruner.config.evaluation import JudgeConfig
from persona_pruner.endpoint import BudgetError, Endpoint, EndpointError, UnansweredError

OPTIONS = {"logprobs": True, "top_logprobs": 3}


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with judge_server() as running:
        yield running


def ask(url, count=1, **settings):
    endpoint = Endpoint(JudgeConfig(model="m", base_url=f"{url}/v1", **settings), "evaluation.judges.0")

    async def every():
        async with endpoint:
            asked = (endpoint.ask([{"role": "user", "content": f"{n}?"}], **OPTIONS) for n in range(count))
            return await asyncio.gather(*asked, return_exceptions=True)

    return endpoint, asyncio.run(every())


def test_costs_are_counted_and_the_budget_ends_it(server):
    endpoint, choices = ask(server.url, 5)
    assert [choice.finish_reason for choice in choices] == ["length"] * 5
    assert (endpoint.costs.requests, endpoint.costs.prompt_tokens, endpoint.costs.completion_tokens) == (5, 50, 5)
    _, choices = ask(server.url, 5, token_budget=20, concurrency=1)
    assert [type(choice).__name__ for choice in choices] == ["Choice"] * 2 + ["BudgetError"] * 3
    assert str(choices[-1]) == "22 tokens paid for, evaluation.judges.0.token_budget is 20"
    assert isinstance(choices[-1], BudgetError)


def test_an_answer_that_is_no_chat_completion_is_asked_for_again(server):
    server.nonsense = 2
    assert ask(server.url)[1][0].finish_reason == "length"
    server.nonsense = 3
    assert isinstance(ask(server.url)[1][0], UnansweredError)


def test_a_refused_key_is_told_without_the_key(server):
    with faults.proxy(server.url) as proxy:
        proxy.plan(faults.DENY)
        (error,) = ask(proxy.url)[1]
    assert isinstance(error, EndpointError)
    assert "the key is refused; check OPENAI_API_KEY" in str(error)
    assert "sk-" not in str(error)


def test_a_missing_key_is_told_before_anything_is_asked(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(EndpointError, match=r"OPENAI_API_KEY is not set .*evaluation\.judges\.0"):
        ask("http://127.0.0.1:1")
