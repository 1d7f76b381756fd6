"""What 1,000 personas cost on three model shapes: the tables of docs/scaling.md, from the model that `plan` uses.

python tests/benchmarks/cost.py [--gpu h100] [--questions 1000] [--prompt-characters 800]

Default settings in bfloat16. Nothing is measured here: persona_pruner/run/cost.py says what is assumed.
"""

import argparse
import json

from persona_pruner.config.load import check_config
from persona_pruner.run.cost import CHARACTERS_PER_TOKEN, GPUS, SHAPES, Todo, answering, forecast, scoring, training

SHARDS = {"Llama-3.2-3B": 1, "8B": 1, "70B": 4}
PERSONAS = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", choices=list(GPUS), default="h100")
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--prompt-characters", type=int, default=800)
    parser.add_argument("--quick", action="store_true", help="the same: it takes a second")
    options = parser.parse_args()
    gpu, prompt = GPUS[options.gpu], options.prompt_characters / CHARACTERS_PER_TOKEN
    results = {}
    print("| model | shards | scoring | answering | training | GPU-hours | dollars | answered elsewhere: GPU-hours |")
    print("|---|---|---|---|---|---|---|---|")
    for name, shape in SHAPES.items():
        pool = {"shards": SHARDS[name]}
        tree = {"backbone": {"dtype": "bfloat16"}, "groups": pool, "synthesis": {"actors": pool}}
        config = check_config(tree)
        work = [scoring(config, shape, prompt, options.questions), answering(config, shape, prompt)]
        work.append(training(config, shape, prompt))
        todo = Todo(PERSONAS, 0, options.prompt_characters, options.questions)
        whole = forecast(config, shape, todo, gpu)
        rewrite = {"rewrite": {"backend": "openai"}, "actors": pool}
        elsewhere = forecast(check_config(tree | {"synthesis": rewrite}), shape, todo, gpu)
        phases = [
            f"{each.flop / 1e12:,.0f} TFLOP, {each.gpu_seconds(gpu, shape, 2, SHARDS[name]):.1f} s" for each in work
        ]
        print(
            f"| {name} | {SHARDS[name]} | {' | '.join(phases)} | {whole.gpu_hours:.3g} | {whole.dollars:.3g} "
            f"| {elsewhere.gpu_hours:.3g} |"
        )
        results[name] = whole.to_dict() | {"answered_elsewhere_gpu_hours": round(elsewhere.gpu_hours, 1)}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
