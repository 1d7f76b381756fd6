"""Settings of the evaluation: which answers are asked for, who judges them, and what a mask must reach."""

from typing import Annotated, Literal

from pydantic import Field

from persona_pruner.config.section import Count, HashedContent, NonNegative, Positive, Section

Baseline = Literal["activation", "activation_generic", "taylor", "flap", "magnitude", "random"]


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
    baselines: tuple[Baseline, ...] = ("activation",)
    """Masks without training that the own one is compared with, of as many channels: by activations on the persona's
    rows or on generic text, LLM-Pruner's first-order Taylor and FLAP (with its biases) on generic text, by weights, or
    by chance."""


class AbilitiesConfig(Section):
    enabled: bool = True
    """Whether `persona-pruner evaluate` asks for them."""
    tasks: str | None = None
    """JSON Lines: {"ability": "json", "question", "schema"}, {"ability": "tool", "question", "tools", "call"} or
    {"ability": "injection", "question", "marker"}; null takes the shipped ones."""
    limit: Count | None = None
    """Tasks of each ability, the first ones; null is all."""


DEFAULT_CONSISTENCY = """You rate how well a reply fits a character.

Character: {persona}

Someone asked: {question}
The reply: {answer}

Could this character have said this, in its voice, with its knowledge and its values? Rate the fit from 0 (somebody \
else is speaking, or nobody) to {scale} (unmistakably this character). Write the number and nothing else."""
DEFAULT_COHERENCE = """You rate how well a reply is written, whoever says it.

Someone asked: {question}
The reply: {answer}

Is it understandable, whole, and an answer to what was asked? Rate it from 0 (noise) to {scale} (clear and to the \
point). Do not rate whether you agree. Write the number and nothing else."""
DEFAULT_PREFERENCE = """You compare two replies of the same character.

Character: {persona}

Someone asked: {question}
Reply A: {a}
Reply B: {b}

Which one is the better reply of this character: in its voice, true to it, and understandable? Write A or B and \
nothing else."""


class JudgePrompts(Section):
    consistency: str = DEFAULT_CONSISTENCY
    """May contain {persona}, {question} and {answer}; must ask for one whole number from 0 to {scale}."""
    coherence: str = DEFAULT_COHERENCE
    """The same."""
    preference: str = DEFAULT_PREFERENCE
    """May contain {persona}, {question}, {a} and {b}; must ask for A or B."""


class EndpointConfig(Section):
    model: str
    """The model's name at the endpoint."""
    base_url: str | None = None
    """The endpoint, e.g. http://host:8000/v1. The key comes from OPENAI_API_KEY."""
    concurrency: Count = 16
    """Requests under way at once."""
    requests_per_minute: Count | None = None
    """Upper limit; null is none."""
    timeout_seconds: Positive = 60.0
    """One request, from sending to the last byte."""
    deadline_seconds: Positive = 600.0
    """All tries for one reply together."""
    token_budget: Count | None = None
    """Stop cleanly once about this many tokens (in and out) were paid for in this evaluation; null is none."""


DEFAULT_USER = """You are talking with somebody whom you have just met and would like to know better. So far you said:

{conversation}

Write what you say next, in one or two sentences. Write nothing else."""


class DialoguesConfig(Section):
    enabled: bool = False
    """Whether `persona-pruner evaluate` has them."""
    count: Count = 1
    """Conversations with each arm; they begin with the persona's first held-out questions."""
    turns: Count = 10
    """What the user says in each, and the replies to it."""
    user: EndpointConfig | None = None
    """Who plays the user; null is the unpruned backbone, without the persona. Limits are those of one shard group."""
    user_prompt: str = DEFAULT_USER
    """What it is told; {conversation} is replaced by what both have said."""


class JudgeConfig(EndpointConfig):
    name: str | None = None
    """What the judge is called in figures; null is its model."""
    aspects: tuple[Literal["consistency", "coherence"], ...] = ("consistency", "coherence")
    """What each answer is scored for, 0 to 100."""
    pairs: tuple[Literal["unpruned", "global", "other"] | Baseline, ...] = ()
    """Arms whose answers are compared with those of the own mask, in both orders."""
    turns: tuple[Count, ...] | None = None
    """Turns of conversations whose replies are scored, such as [1, 5, 10]; null is all of them."""
    scale: Annotated[int, Field(ge=1, le=100)] = 100
    """The best score that it may give, {scale} in the prompts; figures are from 0 to 100 all the same. A judge whose
    tokenizer writes 42 as two tokens (Qwen's, Gemma's, Mistral's) needs 9."""
    top_logprobs: Annotated[int, Field(ge=1, le=100)] = 20
    """Tokens whose probabilities make the score: its expectation."""
    least_mass: Annotated[float, Field(ge=0, le=1)] = 0.25
    """An answer is unscored where the numbers among those tokens have less probability than this."""

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
    abilities: AbilitiesConfig = AbilitiesConfig()
    """Tasks that need no judge: JSON of a schema, calls of tools, attempts to talk a character out of its role."""
    dialogues: DialoguesConfig = DialoguesConfig()
    """Conversations with a simulated user."""
    judges: tuple[JudgeConfig, ...] = ()
    """Models that score the answers of `persona-pruner evaluate`."""
    judge_prompts: JudgePrompts = JudgePrompts()
    """What they are asked."""
    benchmarks: BenchmarksConfig = BenchmarksConfig()
    """What `persona-pruner benchmark` runs."""
    passes: tuple[str, ...] = ()
    """Conditions such as `judge>=75` on the catalog's evaluation columns that a mask must meet to pass."""
