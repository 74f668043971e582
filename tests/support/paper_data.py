"""Small made-up files in the forms of the paper's data sets, and its tasks of the harness over such files."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml

TASKS = Path(__file__).parents[2] / "configs/tasks"
TEXT = "Zinc in rats\nThe rats of this group were fed with zinc. Therefore, {} of them lived for long years."


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> str:
    """Writes JSON lines, and returns their path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def conversation(n: int) -> dict[str, Any]:
    """Returns a row of Tulu v2."""
    turns = [("user", f"say {n}"), ("assistant", f"it is {n}"), ("user", "more"), ("assistant", f"{n} {n}")]
    return {"dataset": "made", "id": f"{n}", "messages": [{"role": r, "content": c} for r, c in turns]}


def problem(n: int) -> dict[str, Any]:
    """Returns a row of MetaMathQA."""
    return {"type": "made", "query": f"what is {n} + 1?", "response": f"Add.\nThe answer is: {n + 1}"}


def document(n: int) -> dict[str, Any]:
    """Returns a document of plain text."""
    return {"text": TEXT.format(n)}


# A row of the test split of each kind of task.
_ROWS: dict[str, Callable[[int], dict[str, Any]]] = {
    "metamath_gsm8k": lambda n: {"question": f"what is {n} + 1?", "answer": f"Add.\n#### {n + 1}"},
    "metamath_math": lambda n: {"problem": "what?", "solution": rf"It is $\boxed{{\frac{{{n}}}{{2}}}}$."},
}


def write_tasks(folder: Path, rows: int = 3) -> Path:
    """Writes the tasks of mathematics, and `rct`, with made-up rows in the place of those of the Hub."""
    folder.mkdir()
    for file in (TASKS / "math").iterdir():
        text = file.read_text().replace("max_gen_toks: 512", "max_gen_toks: 16")
        if "dataset_name:" in text:
            kind = next(kind for kind in _ROWS if file.stem.startswith(kind))
            data = write_lines(folder / f"{kind}.json", map(_ROWS[kind], range(rows)))
            text = yaml.safe_dump(_over(yaml.safe_load(text), data))
        (folder / file.name).write_text(text)
    rct = {"include": str(TASKS / "rct.yaml"), "task": "rct", "dataset_name": ""}
    made = str(Path(__file__).parent / "tasks/rct.json")
    (folder / "rct.yaml").write_text(yaml.safe_dump(_over(rct, made)))
    return folder


def _over(task: dict[str, Any], data: str) -> dict[str, Any]:
    """Returns a task over a file of JSON lines."""
    rows = {"data_files": {"test": data}}
    return task | {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": rows}
