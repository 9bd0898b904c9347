"""A DPO, reward-model and SFT step on real pairs: ours beside TRL's, and ours against how much there is to compute.

    make bench-preference DATA=pairs.jsonl
    python benchmarks/preference_step.py pairs.jsonl [--pairs 2] [--steps 4] [--repeats 3]

Both sides train the same weights on the same pairs in the same order, in fp32 on one thread of a CPU, with the same
optimizer and learning rate; losses of every step must agree to 1e-4 or the run fails. Each measurement is a process of
its own, so that its peak of resident memory is its own, and the sides take turns. A step is what lies between two
batches: forward, backward, clipping, optimizer. The first one is not timed, for it also makes the optimizer's state.
Figures are CPU seconds, which a busy machine changes far less than the time on the clock, as medians over all timed
steps. The sides:

    ours                our defaults; DPO's reference is computed before the first step, see "reference_cpu_seconds"
    ours, sparing       with activation checkpointing and at most 256 MiB of logits
    trl                 its trainers without activation checkpointing, for DPO with a copy of the model as reference
    trl, precomputed    with precompute_ref_log_probs
    trl, checkpointed   with activation checkpointing; not timed for DPO

TRL pads every sequence of a step to the longest one; ours packs them, with the prompt of a pair once. What is left of
the tokens stands beside the figures: it limits what any way of computing the same layers can gain. DPO gains more, for
ours has no reference to compute in a step, and projects onto the vocabulary only where an answer stands.

Without TRL only ours is timed, and a line says so. The pairs of a step have different prompts, but for "reward,
ranked", where they rank answers to one prompt: there ours computes every answer once, as `recipes/reward.py` does by
default. The output keeps what it holds of other kinds, if they were measured in the same setting.

The second part times ours alone on made-up tokens, against the answers of a prompt and the prompt's length: once with
the prompt computed once, and once with every answer in a sequence of its own. The ratio of the tokens that the two
have to compute is the limit of what sharing the prompt can gain.

Writes results/preference_step.json and, with matplotlib, results/preference_step.png.
"""

import argparse
import importlib.util
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import numpy as np
import torch

import umedtrain as ut
from umedtrain.config import ModelConfig, OptimizerConfig, ParallelConfig
from umedtrain.data.batch import Batch
from umedtrain.data.care import check_pairs, prompt_key
from umedtrain.data.example import Example, Segment, encode_conversation, encode_preference
from umedtrain.data.loader import Loader
from umedtrain.data.ranking import merge_pairs
from umedtrain.distributed.world import finalize, initialize
from umedtrain.model.config import LlamaConfig
from umedtrain.recipes.dpo import LossConfig, pair_loss
from umedtrain.records import Conversation, Preference, read_preferences
from umedtrain.training.build import build_model
from umedtrain.training.loop import train_step
from umedtrain.training.optimizer import build_optimizer
from umedtrain.training.reference import build_reference
from umedtrain.training.tasks import PreferenceTask, RewardTask, SFTTask

RESULTS = Path(__file__).parent / "results"
SHAPE = LlamaConfig(
    vocab_size=128_256,
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
    tie_word_embeddings=True,
    rope_theta=500_000.0,
    max_position_embeddings=8192,
)
MAX_TOKENS = 1024  # of a prompt and one answer; TRL cuts there, so nothing longer is used
BETA, LEARNING_RATE, MAX_GRAD_NORM = 0.1, 1e-5, 1.0
SPARING = {"activation_checkpointing": True, "logits_megabytes": 256}
SIDES = {
    "dpo": ("ours", "ours, sparing", "trl", "trl, precomputed"),
    "reward": ("ours", "ours, sparing", "trl", "trl, checkpointed"),
    "reward, ranked": ("ours", "trl"),
    "sft": ("ours", "ours, sparing", "trl", "trl, checkpointed"),
}
TOLERANCE = 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="pairs: UltraMedical-Preference's layout, or {prompt, chosen, rejected}")
    parser.add_argument("--tokenizer", help="Llama-3's tokenizer.model; by default that of the package llama-models")
    parser.add_argument("--kinds", nargs="*", default=list(SIDES), choices=SIDES, metavar="KIND")
    parser.add_argument("--pairs", type=int, default=2, help="pairs in a step")
    parser.add_argument("--steps", type=int, default=4, help="timed steps of a process")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each side")
    parser.add_argument("--no-scaling", action="store_true", help="leave the second part out")
    parser.add_argument("--output", type=Path, default=RESULTS / "preference_step.json")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a measurement, in a process of its own
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(**json.loads(arguments.one))))
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = prepare(arguments, Path(folder))
        report = {
            "setting": {
                "model": {name: getattr(SHAPE, name) for name in SHAPE.__dataclass_fields__},
                "parameters": rows["parameters"],
                "pairs per step": arguments.pairs,
                "timed steps": arguments.steps,
                "repeats": arguments.repeats,
                "dtype": "float32",
                "threads": 1,
                "tokens of a step's pairs": rows["tokens"],
                "machine": f"{platform.machine()}, {cpu_name()}, {os.cpu_count()} CPUs",
                "versions": {name: version(name) for name in ("torch", "transformers", "trl") if installed(name)},
            },
            "side by side": {},
            "tokens, of trl's": {},
            "scaling": [],
        }
        before = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
        if before.get("setting") == json.loads(json.dumps(report["setting"])):
            report = before
        for kind in arguments.kinds:
            report["side by side"][kind] = side_by_side(kind, arguments, Path(folder))
            report["tokens, of trl's"][kind] = rows["tokens, of trl's"][kind]
            write(report, arguments.output)
        if not arguments.no_scaling:
            report["scaling"] = scaling(Path(folder))
            write(report, arguments.output)
    print(table(report))
    if installed("matplotlib"):
        plot(report, arguments.output.with_suffix(".png"))


def write(report: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


# ---- what both sides are given


def prepare(arguments: argparse.Namespace, folder: Path) -> dict:
    """The two models and the pairs in `folder`; returns what there is to know of them."""
    tokenizer = ut.load_tokenizer(arguments.tokenizer or llama3_tokenizer())
    wanted = arguments.pairs * (arguments.steps + 1)
    (pairs,), _, _ = check_pairs([read_preferences(arguments.data)])
    # Pairs of a prompt stand together in the file; training shuffles them, and so do we, once for both sides.
    random.Random(0).shuffle(pairs)
    encode = partial(encode_preference, tokenizer=tokenizer, max_tokens=2 * MAX_TOKENS)
    examples = [(pair, encode(pair)) for pair in pairs]
    kept = [(pair, example) for pair, example in examples if isinstance(example, Example) and fits(example)][:wanted]
    if len(kept) < wanted:
        raise SystemExit(f"{arguments.data}: {len(kept)} pairs fit {MAX_TOKENS} tokens, but {wanted} are needed")
    write_pairs(folder / "pairs.jsonl", [pair for pair, _ in kept])
    by_prompt: dict = {}
    for pair, example in examples:
        if isinstance(example, Example) and fits(example):
            by_prompt.setdefault(prompt_key(pair), []).append(pair)
    ranked = [group[: arguments.pairs] for group in by_prompt.values() if len(group) >= arguments.pairs]
    if "reward, ranked" in arguments.kinds and len(ranked) <= arguments.steps:
        raise SystemExit(
            f"{arguments.data}: {len(ranked)} prompts have {arguments.pairs} pairs; leave out reward, ranked"
        )
    write_pairs(folder / "ranked.jsonl", list(chain(*ranked[: arguments.steps + 1])))
    for name, kind in (("llama", ut.Llama), ("reward", ut.RewardModel)):
        model = kind(SHAPE)
        model.init_weights(seed=0)
        ut.save_model(model, folder / name, tokenizer=tokenizer)
    of_ranked = [encode(pair) for pair in chain(*ranked[: arguments.steps + 1])]
    steps, ranked_steps = (
        batched([segment_lengths(example) for example in examples], arguments.pairs)
        for examples in ([example for _, example in kept], of_ranked)
    )
    trees = merge_pairs(of_ranked, max_tokens=8 * MAX_TOKENS)
    shares = {
        "dpo": share_of_tokens(steps[1:], steps[1:]),
        "reward": share_of_tokens(steps[1:], steps[1:]),
        "sft": share_of_tokens(*[[[pair[:2] for pair in step] for step in steps[1:]]] * 2),
    }
    if ranked_steps:
        shares["reward, ranked"] = share_of_tokens([[segment_lengths(tree)] for tree in trees[1:]], ranked_steps[1:])
    count = sum(parameter.numel() for parameter in model.parameters())
    return {"tokens": steps, "parameters": count, "tokens, of trl's": shares}


def segment_lengths(example: Example) -> list[int]:
    """Tokens of a prompt and of its answers."""
    return [len(segment.tokens) for segment in example.segments]


def share_of_tokens(ours: list[list[list[int]]], trl: list[list[list[int]]]) -> float:
    """Tokens that ours computes over those that TRL does, of the segments' lengths of each example of each step.

    TRL pads all sequences of a step, of a prompt and an answer each, to the longest.
    """
    padded = (
        sum(len(answers) for _, *answers in step) * max(prompt + max(answers) for prompt, *answers in step)
        for step in trl
    )
    return sum(map(sum, chain(*ours))) / sum(padded)


def write_pairs(path: Path, pairs: list[Preference]) -> None:
    rows = [{"prompt": list(pair.prompt), "chosen": pair.chosen, "rejected": pair.rejected} for pair in pairs]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def fits(example: Example) -> bool:
    prompt, *answers = (len(segment.tokens) for segment in example.segments)
    return prompt + max(answers) <= MAX_TOKENS


def batched(values: list, size: int) -> list[list]:
    return [values[start : start + size] for start in range(0, len(values), size)]


def llama3_tokenizer() -> Path:
    package = importlib.util.find_spec("llama_models")
    if package is None:
        raise SystemExit("no Llama-3 tokenizer: name one with --tokenizer, or pip install --no-deps llama-models")
    return Path(package.origin).parent / "llama3" / "tokenizer.model"


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def run_alone(**what: object) -> dict:
    """`measure(**what)` in a process of its own, on one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, __file__, "-", "--one", json.dumps(what)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    if process.returncode:
        raise SystemExit(f"{what}:\n{process.stderr}")
    return json.loads(process.stdout.splitlines()[-1])


def measure(side: str, **what: object) -> dict:
    """One process's figures."""
    torch.set_num_threads(1)
    sides = {"ours": partial(our_side, {}), "ours, sparing": partial(our_side, SPARING), "scaling": scaling_step}
    result = sides.get(side, partial(trl_side, side))(**what)
    return result | {"peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


# ---- the sides


def our_side(parallel: dict, kind: str, folder: str, pairs: int, steps: int) -> dict:
    world = initialize()
    parallel = ParallelConfig(dtype="float32", **parallel)
    tokenizer = ut.load_tokenizer(Path(folder) / "llama")
    kind, _, ranked = kind.partition(", ")
    records = read_preferences(Path(folder) / f"{ranked or 'pairs'}.jsonl")
    if kind == "sft":
        turns = [(*record.prompt, {"role": "assistant", "content": record.chosen}) for record in records]
        examples = [encode_conversation(Conversation(turn), tokenizer, max_tokens=MAX_TOKENS) for turn in turns]
    else:
        examples = [encode_preference(record, tokenizer, max_tokens=2 * MAX_TOKENS) for record in records]
    if ranked:
        examples, pairs = merge_pairs(examples, max_tokens=8 * MAX_TOKENS), 1
    loader = Loader([examples], batch_size=pairs, max_tokens=8 * MAX_TOKENS, shuffle=False)
    class_, name = (ut.RewardModel, "reward") if kind == "reward" else (ut.Llama, "llama")
    model = build_model(class_, ModelConfig(f"{folder}/{name}"), parallel, tokenizer, world, seed=0)
    chunk_bytes = parallel.logits_megabytes * 2**20
    started = time.process_time()
    if kind == "dpo":
        cache = Path(folder) / f"reference-{os.getpid()}"
        options = {"parallel": parallel, "weights": "start", "progress": False}
        reference = build_reference("cache", model, loader, cache, world, **options)
        task = PreferenceTask(pair_loss(LossConfig(beta=BETA)), reference, beta=BETA, chunk_bytes=chunk_bytes)
    else:
        task = RewardTask() if kind == "reward" else SFTTask(chunk_bytes)
    reference_seconds = time.process_time() - started
    optimizer = build_optimizer(model, OptimizerConfig(lr=LEARNING_RATE, betas=(0.9, 0.999)))
    options = {"world": world, "max_grad_norm": MAX_GRAD_NORM}
    seconds, values = [], []
    for step in range(steps + 1):
        started = time.process_time()
        metrics = train_step(model, optimizer, loader, task, step, LEARNING_RATE, **options)
        seconds.append(time.process_time() - started)
        values.append(metrics["loss"])
    finalize()
    result = {"cpu_seconds": seconds[1:], "losses": values}
    return result | ({"reference_cpu_seconds": reference_seconds / (steps + 1)} if kind == "dpo" else {})


def trl_side(side: str, kind: str, folder: str, pairs: int, steps: int) -> dict:
    import datasets
    import transformers
    import trl

    def said(text):
        return [{"role": "assistant", "content": text}]

    class Clock(transformers.TrainerCallback):
        """CPU seconds between the batch's arrival and the end of the optimizer's step."""

        def __init__(self):
            self.seconds = []

        def on_step_begin(self, *_args, **_kwargs):
            self.started = time.process_time()

        def on_step_end(self, *_args, **_kwargs):
            self.seconds.append(time.process_time() - self.started)

    values = []

    def recording(trainer):
        """The trainer, keeping the losses as they are; its log rounds them."""

        class Recording(trainer):
            def training_step(self, *args, **kwargs):
                loss = super().training_step(*args, **kwargs)
                values.append(float(loss))
                return loss

        return Recording

    datasets.disable_progress_bars()
    common = {
        "output_dir": f"{folder}/trl",
        "per_device_train_batch_size": pairs,
        "max_steps": steps + 1,
        "max_length": MAX_TOKENS,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": MAX_GRAD_NORM,
        "train_sampling_strategy": "sequential",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": side == "trl, checkpointed",
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    kind, _, ranked = kind.partition(", ")
    records = [json.loads(line) for line in Path(folder, f"{ranked or 'pairs'}.jsonl").read_text().splitlines()]
    if kind == "sft":
        rows = [{"prompt": row["prompt"], "completion": said(row["chosen"])} for row in records]
    else:
        rows = [
            {"prompt": row["prompt"], "chosen": said(row["chosen"]), "rejected": said(row["rejected"])}
            for row in records
        ]
    path = f"{folder}/{'reward' if kind == 'reward' else 'llama'}"
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    tokenizer.pad_token = tokenizer.pad_token or "<|finetune_right_pad_id|>"
    if kind == "reward":
        model = transformers.AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32, num_labels=1)
        model.config.pad_token_id = tokenizer.pad_token_id
        trainer, config = trl.RewardTrainer, trl.RewardConfig(**common)
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        if kind == "sft":
            trainer, config = trl.SFTTrainer, trl.SFTConfig(**common)
        else:
            once = side == "trl, precomputed"
            trainer, config = trl.DPOTrainer, trl.DPOConfig(beta=BETA, precompute_ref_log_probs=once, **common)
    timer = Clock()
    run = recording(trainer)(
        model=model,
        args=config,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[timer],
    )
    run.train()
    return {"cpu_seconds": timer.seconds[1:], "losses": values}


# ---- side by side


def side_by_side(kind: str, arguments: argparse.Namespace, folder: Path) -> dict:
    """Of every side the medians, and their share of TRL's."""
    sides = [side for side in SIDES[kind] if side.startswith("ours") or installed("trl")]
    if not installed("trl"):
        print(f"{kind}: TRL is not installed (pip install trl), so only ours is timed", file=sys.stderr)
    runs: dict[str, list[dict]] = {side: [] for side in sides}
    for repeat in range(arguments.repeats):
        for side in sides:
            options = {"folder": str(folder), "pairs": arguments.pairs, "steps": arguments.steps}
            runs[side].append(run_alone(side=side, kind=kind, **options))
            print(f"{kind}, {side}, {repeat + 1} of {arguments.repeats}: {runs[side][-1]}", file=sys.stderr)
    report = {side: summary(of_side) for side, of_side in runs.items()}
    for side, row in report.items():
        distance = max(abs(a - b) for a, b in zip(report["ours"]["losses"], row["losses"], strict=True))
        if not distance <= TOLERANCE:
            raise SystemExit(f"{kind}, {side}: losses differ: {report['ours']['losses']} and {row['losses']}")
        row["largest difference of losses"] = distance
        if "trl" in report:
            row |= {f"{name}, of trl's": row[name] / report["trl"][name] for name in ("cpu_seconds", "peak_rss_mib")}
    return report


def summary(runs: list[dict]) -> dict:
    seconds = [value for run in runs for value in run["cpu_seconds"]]
    result = {
        "cpu_seconds": statistics.median(seconds),
        "cpu_seconds_range": [min(seconds), max(seconds)],
        "peak_rss_mib": statistics.median(run["peak_rss_mib"] for run in runs),
        "losses": runs[0]["losses"],
    }
    if "reference_cpu_seconds" in runs[0]:
        result["reference_cpu_seconds"] = statistics.median(run["reference_cpu_seconds"] for run in runs)
    return result


# ---- against answers and prompt length

ANSWER = 128
POINTS = [(2, 256), (4, 256), (8, 256), (4, 64), (4, 1024)]
"""(answers, tokens of the prompt); answers have `ANSWER` tokens each."""


def scaling(folder: Path) -> list[dict]:
    report = []
    for kind in ("dpo", "reward"):
        for answers, prompt in POINTS:
            made = {"kind": kind, "answers": answers, "prompt": prompt, "answer": ANSWER}
            point: dict = dict(made)
            sizes = {"shared": prompt + answers * ANSWER, "separate": answers * (prompt + ANSWER)}
            for layout, tokens in sizes.items():
                run = run_alone(side="scaling", folder=str(folder), layout=layout, **made)
                point[layout] = {"tokens": tokens, "cpu_seconds": statistics.median(run["cpu_seconds"])}
                point[layout]["peak_rss_mib"] = run["peak_rss_mib"]
            for figure in ("tokens", "cpu_seconds", "peak_rss_mib"):
                point[f"{figure}, ratio"] = point["shared"][figure] / point["separate"][figure]
            report.append(point)
            print(point, file=sys.stderr)
    return report


def scaling_step(kind: str, folder: str, layout: str, answers: int, prompt: int, answer: int) -> dict:
    """Two prompts, all answers of each; every answer is better than the next one."""
    world = initialize()
    generator = np.random.default_rng(0)
    examples = [made_up(generator, answers, prompt, answer, shared=layout == "shared") for _ in range(2)]
    loader = Loader([examples * 4], batch_size=2, max_tokens=10**6, shuffle=False)
    model = ut.load_model(Path(folder) / ("reward" if kind == "reward" else "llama"), dtype=torch.float32)
    task = RewardTask() if kind == "reward" else PreferenceTask(pair_loss(LossConfig(beta=BETA)), zeros, beta=BETA)
    optimizer = build_optimizer(model, OptimizerConfig())
    seconds = []
    for step in range(4):
        started = time.process_time()
        train_step(model, optimizer, loader, task, step, LEARNING_RATE, world=world, max_grad_norm=MAX_GRAD_NORM)
        seconds.append(time.process_time() - started)
    finalize()
    return {"cpu_seconds": seconds[1:]}


def zeros(batch: Batch) -> torch.Tensor:
    """A reference that costs nothing."""
    return torch.zeros(sum(batch.answers))


def made_up(generator: np.random.Generator, answers: int, prompt: int, answer: int, *, shared: bool) -> Example:
    def draw(length: int) -> np.ndarray:
        return generator.integers(0, SHAPE.vocab_size, length).astype(np.int32)

    asked, said = draw(prompt), [draw(answer) for _ in range(answers)]
    learned = np.full(answer, True)
    if shared:
        segments = [Segment(asked, np.full(prompt, False)), *(Segment(text, learned, parent=0) for text in said)]
    else:
        mask = np.concatenate([np.full(prompt, False), learned])
        segments = [Segment(np.concatenate([asked, text]), mask) for text in said]
    return Example(tuple(segments), pairs=tuple((better, better + 1) for better in range(answers - 1)))


# ---- what is shown


def table(report: dict) -> str:
    lines = ["| step | side | CPU s | of TRL's | tokens, of TRL's | peak MiB | of TRL's |", "|" + " --- |" * 7]
    for kind, sides in report["side by side"].items():
        for side, row in sides.items():
            seconds, memory = (row.get(f"{figure}, of trl's") for figure in ("cpu_seconds", "peak_rss_mib"))
            tokens = report["tokens, of trl's"][kind] if side.startswith("ours") else None
            shown = [f"{row['cpu_seconds']:.1f}", share(seconds), share(tokens), f"{row['peak_rss_mib']:.0f}"]
            shown.append(share(memory))
            lines.append(f"| {kind} | {side} | {' | '.join(shown)} |")
    if report["scaling"]:
        lines += ["", "| step | answers | prompt | tokens, shared / separate | CPU | peak memory |", "|" + " --- |" * 6]
    for point in report["scaling"]:
        ratios = " | ".join(f"{point[f'{name}, ratio']:.2f}" for name in ("tokens", "cpu_seconds", "peak_rss_mib"))
        lines.append(f"| {point['kind']} | {point['answers']} | {point['prompt']} | {ratios} |")
    return "\n".join(lines)


def share(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def plot(report: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 4, figsize=(15, 3.6), layout="constrained")
    colors = {
        "ours": "tab:blue",
        "ours, sparing": "lightblue",
        "trl": "dimgray",
        "trl, precomputed": "darkgray",
        "trl, checkpointed": "lightgray",
    }
    for axis, name, title in ((axes[0], "cpu_seconds", "CPU s of a step"), (axes[1], "peak_rss_mib", "peak MiB")):
        for place, sides in enumerate(report["side by side"].values()):
            for shift, (side, row) in enumerate(sides.items()):
                label = side if place == 0 else None
                axis.bar(place + 0.17 * shift, row[name], 0.16, color=colors[side], label=label)
        axis.set_xticks([place + 0.3 for place in range(len(report["side by side"]))], report["side by side"])
        axis.set_title(title)
        axis.legend(frameon=False, fontsize=7)
    for axis, key, fixed in ((axes[2], "answers", ("prompt", 256)), (axes[3], "prompt", ("answers", 4))):
        points = sorted((p for p in report["scaling"] if p[fixed[0]] == fixed[1]), key=lambda point: point[key])
        for kind, color in (("dpo", "tab:blue"), ("reward", "tab:orange")):
            of_kind = [point for point in points if point["kind"] == kind]
            x = [point[key] for point in of_kind]
            for figure_name, style in (("cpu_seconds", "o-"), ("peak_rss_mib", "s:")):
                label = f"{kind}, {'CPU' if figure_name == 'cpu_seconds' else 'memory'}"
                axis.plot(x, [p[f"{figure_name}, ratio"] for p in of_kind], style, color=color, label=label)
        limit = [p for p in points if p["kind"] == "dpo"]
        axis.plot([p[key] for p in limit], [p["tokens, ratio"] for p in limit], "k--", label="tokens: the limit")
        axis.set_xscale("log", base=2)
        axis.set_ylim(0, 1.05)
        axis.set_xlabel({"answers": "answers (prompt of 256)", "prompt": "prompt tokens (4 answers)"}[key])
        axis.set_title("prompt once / once per answer")
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
