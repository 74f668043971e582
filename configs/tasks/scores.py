"""Scores of the tasks in this folder that the harness lacks. Its YAML files name them by `!function`."""

import math
import re
from collections import defaultdict

from sklearn.metrics import f1_score  # the harness requires it

# A word and its type: "Lehman (ORG)".
_ENTITY = re.compile(r"(\S+)\s+\((\S+?)\)")
_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?%?")


def option(doc, results):
    """Returns whether the likeliest option is right, and what F1 counts: class, right and chosen option."""
    likelihoods = [log_p for log_p, _ in results]
    chosen = likelihoods.index(max(likelihoods))
    gold = doc["gold_index"]
    return {"acc": float(chosen == gold), "f1": (doc.get("class_id", 0), gold, chosen)}


def mean_weighted_f1(items):
    """Returns F1 weighted by how often each option is right, averaged over classes of questions."""
    classes = defaultdict(list)
    for kind, gold, chosen in items:
        classes[kind].append((gold, chosen))
    scores = [
        f1_score(*zip(*pairs, strict=True), average="weighted", zero_division=0) for pairs in classes.values()
    ]
    return sum(scores) / len(scores)


def entities(doc, results):
    """Returns F1 of the entities in an answer: a word and its type must both be right."""
    gold, found = ({*_ENTITY.findall(text)} for text in (_label(doc), results[0]))
    right = len(gold & found)
    return {"f1": 2 * right / (len(gold) + len(found)) if gold or found else 1.0}


def number(doc, results):
    """Returns whether a number in the answer's first line is the right one, within 0.01."""
    gold = _numbers(_label(doc))
    found = _numbers(results[0].strip().split("\n")[0])
    return {"exact_match": float(any(math.isclose(x, gold[0], rel_tol=0, abs_tol=0.01) for x in found))}


def _label(doc):
    """Returns the right answer; it may be a list of one."""
    label = doc["label"]
    return label[0] if isinstance(label, list) else label


def _numbers(text):
    found = _NUMBER.findall(text)
    return [float(n.rstrip("%").replace(",", "")) / (100 if n.endswith("%") else 1) for n in found]
