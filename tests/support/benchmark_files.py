"""Folders of files in the shapes that benchmarks are published in."""

import json

from .jsonl import write_rows


def question(text, answer, /, false=("x", "y"), **changes):
    """A question of FaithUn."""
    return {"question": text, "answers": [answer], "false_options": list(false), **changes}


def entities():
    """Three entities of FaithUn with two, one and three clusters; each cluster has an answer of its own."""
    found = {}
    for name, count in (("Q1", 2), ("Q2", 1), ("Q3", 3)):
        answers = [f"{name} answer {i}" for i in range(count)]
        found[name] = {
            "hop1_unlearn": [question(f"{name} base {i}", answer) for i, answer in enumerate(answers)],
            "hop1_test": [
                [question(f"{name} paraphrase {i} {j}", answer) for j in range(2)] for i, answer in enumerate(answers)
            ],
            "hop2_test": [question(f"{name} hops {i}", f"far {i}") for i in range(count)],
            "same_object": [[question(f"{name} same {i}", answer)] for i, answer in enumerate(answers)],
        }
    return found


INDICES = {"forget": (1, 2), "retaining": (0, 4), "test": (3,)}


def write_faithun(folder, content=None, indices=INDICES, splits=""):
    """A folder of FaithUn; `indices` may give a text instead of numbers."""
    (folder / splits).mkdir(parents=True, exist_ok=True)
    (folder / "FaithUn_Dataset.json").write_text(json.dumps(entities() if content is None else content))
    for name, chosen in indices.items():
        text = chosen if isinstance(chosen, str) else "\r\n".join(map(str, chosen))  # as published
        (folder / splits / f"{name}_set_split.txt").write_bytes(text.encode())
    return folder


def tofu_rows(*numbers, perturbed=False):
    """Questions of TOFU with these numbers."""
    rows = [{"question": f"question {i}", "answer": f"the answer is {i}"} for i in numbers]
    if perturbed:
        for i, row in zip(numbers, rows, strict=True):
            row |= {"paraphrased_answer": f"{i} it is", "perturbed_answer": [f"{i + 50} it is", f"{i + 60} it is"]}
    return rows


def write_tofu(folder, **sets):
    """A folder of TOFU: name of a set -> rows, written as `<name>.jsonl`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in sets.items():
        write_rows(folder / f"{name}.jsonl", *rows)
    return folder
