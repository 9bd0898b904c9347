"""A small tokenizer and small files of every kind that recipes read."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

import umedtrain as ut
from umedtrain.text.sentencepiece import train_sentencepiece

ROOT = Path(__file__).parents[2]
ORGANS = ("liver", "kidney", "heart", "lung", "spleen", "stomach", "bladder", "thyroid")
SIGNS = ("fever", "pain", "swelling", "bleeding", "weakness", "jaundice")
LETTERS = "ABCD"


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def question(index):
    """Question with options, and the letter of the right one."""
    options = [ORGANS[(index + place) % len(ORGANS)] for place in range(4)]
    text = f"Which organ causes {SIGNS[index % len(SIGNS)]} of kind {index}?\n\n"
    return text + "\n".join(f"{letter}. {o}" for letter, o in zip(LETTERS, options, strict=True)), LETTERS[index % 4]


def conversation(index, *, words=1):
    text, letter = question(index)
    answer = "because " * (words - 1) + f"So, the answer is {letter}."
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]
    return {"id": f"Tiny,{index}", "type": "Exam", "conversations": turns, "answer": letter}


def preference(index, *, words=1):
    text, letter = question(index)
    wrong = LETTERS[(LETTERS.index(letter) + 1) % 4]
    chosen = "because " * (words - 1) + f"So, the answer is {letter}."
    return {"id": str(index), "prompt": text, "chosen": chosen, "rejected": f"So, the answer is {wrong}."}


def make_files(folder):
    """tokenizer.model, and conversations, preferences (each with a row of 500 words in line 3), questions, prompts."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [conversation(index, words=500 if index == 2 else 1) for index in range(13)]
    write_rows(folder / "conversations.jsonl", rows)
    write_rows(folder / "preferences.jsonl", [preference(i, words=500 if i == 2 else 1) for i in range(9)])
    write_rows(folder / "questions.jsonl", [conversation(index) for index in range(20, 26)])
    write_rows(folder / "prompts.jsonl", [{"id": str(i), "prompt": question(i)[0]} for i in range(30, 35)])
    texts = [turn["value"] for row in rows for turn in row["conversations"]]
    train_sentencepiece(texts, folder / "tokenizer.model", vocab_size=320)
    return folder


def save_random_model(files, path, kind, *, scale=3):
    """A checkpoint of a small model whose outputs differ from input to input."""
    tokenizer = ut.load_tokenizer(files / "tokenizer.model")
    model = kind(dataclasses.replace(ut.PRESETS["half-m"], vocab_size=tokenizer.vocab_size))
    model.init_weights(seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= scale
    ut.save_model(model, path, tokenizer=tokenizer)
    return str(path)


def torchrun(recipe, *arguments, timeout=60):
    """The recipe as a user starts it, on two ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    return subprocess.run(
        [*command, str(ROOT / "recipes" / f"{recipe}.py"), *map(str, arguments)],
        env=environment | {"OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
