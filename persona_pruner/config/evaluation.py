"""Settings of the evaluation: which answers are asked for, who judges them, and what a mask must reach."""

from typing import Annotated, Literal

from pydantic import Field

from persona_pruner.config.section import Count, HashedContent, NonNegative, Positive, Section


class AnswersConfig(Section):
    questions: Count = 8
    """Held-out questions that each persona is asked: its file in `evaluation.questions`, else those of its data."""
    max_new_tokens: Count = 96
    """An answer that does not end within this is cut off, and counted as such."""
    temperature: NonNegative = 0.0
    """0 is greedy: the same answers bit for bit whenever they are asked again."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the most probable tokens that together have this probability; 1 is all."""
    seed: int = 0
    """Decides samples, the same random numbers for every arm, and whom the classifier compares with."""
    batch_size: Count = 32
    """Answers under way at once, of all arms."""
    candidates: Count = 6
    """Descriptions among which the classifier looks for the persona's own; 1 leaves the classifier out."""
    baseline: Literal["activation", "magnitude", "random"] = "activation"
    """The mask without training that the own one is compared with: by the persona's activations, by weights, or by
    chance."""


DEFAULT_CONSISTENCY = """You rate how well a reply fits a character.

Character: {persona}

Someone asked: {question}
The reply: {answer}

Could this character have said this, in its voice, with its knowledge and its values? Rate the fit from 0 (somebody \
else is speaking, or nobody) to 100 (unmistakably this character). Write the number and nothing else."""
DEFAULT_COHERENCE = """You rate how well a reply is written, whoever says it.

Someone asked: {question}
The reply: {answer}

Is it understandable, whole, and an answer to what was asked? Rate it from 0 (noise) to 100 (clear and to the point). \
Do not rate whether you agree. Write the number and nothing else."""
DEFAULT_PREFERENCE = """You compare two replies of the same character.

Character: {persona}

Someone asked: {question}
Reply A: {a}
Reply B: {b}

Which one is the better reply of this character: in its voice, true to it, and understandable? Write A or B and \
nothing else."""


class JudgePrompts(Section):
    consistency: str = DEFAULT_CONSISTENCY
    """May contain {persona}, {question} and {answer}; must ask for one whole number from 0 to 100."""
    coherence: str = DEFAULT_COHERENCE
    """The same."""
    preference: str = DEFAULT_PREFERENCE
    """May contain {persona}, {question}, {a} and {b}; must ask for A or B."""


class JudgeConfig(Section):
    model: str
    """The model's name at the endpoint."""
    name: str | None = None
    """What the judge is called in figures; null is its model."""
    base_url: str | None = None
    """The endpoint, e.g. http://host:8000/v1. The key comes from OPENAI_API_KEY."""
    aspects: tuple[Literal["consistency", "coherence"], ...] = ("consistency", "coherence")
    """What each answer is scored for, 0 to 100."""
    pairs: tuple[Literal["unpruned", "global", "other", "baseline"], ...] = ()
    """Arms whose answers are compared with those of the own mask, in both orders."""
    top_logprobs: Annotated[int, Field(ge=1, le=100)] = 20
    """Tokens whose probabilities make the score: its expectation."""
    least_mass: Annotated[float, Field(ge=0, le=1)] = 0.25
    """An answer is unscored where the numbers among those tokens have less probability than this."""
    concurrency: Count = 16
    """Requests under way at once."""
    requests_per_minute: Count | None = None
    """Upper limit; null is none."""
    timeout_seconds: Positive = 60.0
    """One request, from sending to the last byte."""
    deadline_seconds: Positive = 600.0
    """All tries for one verdict together."""
    token_budget: Count | None = None
    """Stop cleanly once about this many tokens (in and out) were paid for in this evaluation; null is none."""

    @property
    def label(self) -> str:
        return self.name or self.model


class BenchmarksConfig(Section):
    tasks: tuple[str, ...] = ()
    """Names of lm-eval's tasks, such as arc_easy, or of those below `include_path`."""
    include_path: str | None = None
    """Directory of task files of your own, which work without a hub (`dataset_path: json`)."""
    limit: Count | None = None
    """Questions per task, the first ones; null is all."""
    few_shot: Annotated[int, Field(ge=0)] = 0
    """Examples before each question."""
    batch_size: Count = 8
    """Questions run together."""


class EvaluationConfig(Section):
    enabled: bool = False
    """Compare each mask with the baselines at the end (the quickstart's table)."""
    conversations: str | None = None
    """JSON Lines of persona_id, question, answer: text of the personas that the backbone did not write."""
    max_rows: Count = 64
    """Rows per persona and kind of text."""
    questions: HashedContent[str | None] = None
    """Directory of <persona_id>.json or <persona_id>.txt files: questions never used to make that persona's data."""
    answers: AnswersConfig = AnswersConfig()
    """What `persona-pruner evaluate` asks."""
    judges: tuple[JudgeConfig, ...] = ()
    """Models that score the answers of `persona-pruner evaluate`."""
    judge_prompts: JudgePrompts = JudgePrompts()
    """What they are asked."""
    benchmarks: BenchmarksConfig = BenchmarksConfig()
    """What `persona-pruner benchmark` runs."""
    passes: tuple[str, ...] = ()
    """Conditions such as `judge>=75` on the catalog's evaluation columns that a mask must meet to pass."""
