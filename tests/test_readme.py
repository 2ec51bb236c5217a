"""What the README and the guide to training tell people to type, typed."""

import re
import shlex
from pathlib import Path

import pytest

from warploom.bench import chart
from warploom.engine.cli import available, main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
EXAMPLES = (ROOT / "docs" / "examples" / "README.md").read_text(encoding="utf-8")
NOVEL = "话说天下大势，分久必合，合久必分。The empire, long divided, must unite.\n" * 200
SHRUNK = {  # the same commands, a smaller model of less text
    "train": "--steps 4 --d-model 32 --n-layers 1 --n-heads 2 --n-kv-heads 1 --max-seq-len 32",
    "data": "--num-samples 100 --vocab-size 512",
    "eval": "--limit 2",
    "rl": "--steps 1 --prompts 2 --group 2 --max-tokens 4 --eval-problems 2",
}


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)


def commands(page: str) -> list[list[str]]:
    lines = [line for block in blocks("sh", page) for line in block.splitlines() if line.startswith("warploom ")]
    return [shlex.split(line, comments=True)[1:] for line in lines]


@pytest.fixture
def empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_python_example_runs_as_printed(empty_directory, capsys):
    (example,) = blocks("python")
    exec(compile(example, "README.md", "exec"), {})
    assert len(capsys.readouterr().out) > 40
    assert (empty_directory / "runs/readme/model.safetensors").exists()


@pytest.mark.parametrize("page", [README, GUIDE, EXAMPLES], ids=["README", "training", "examples"])
def test_the_commands_run_in_order(page, empty_directory, capsys):
    (empty_directory / "novel.txt").write_text(NOVEL, encoding="utf-8")
    for verb, *flags in commands(page):
        assert main([verb, *flags, *SHRUNK.get(verb, "").split()]) == 0, capsys.readouterr().err


def test_every_make_target_and_verb_that_is_named_exists():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"\bmake ([a-z]+)\b", "\n".join(blocks("sh")))):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    for verb in set(re.findall(r"`warploom ([a-z]+)", README + GUIDE + EXAMPLES)):
        assert verb in available(), verb


def test_every_linked_file_exists():
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert link.startswith("http") or (page.parent / link).exists(), f"{page.name}: {link}"


def test_log_pages_are_all_in_the_index():
    log = ROOT / "docs" / "log"
    index = (log / "README.md").read_text(encoding="utf-8")
    assert all(f"({page.name})" in index for page in log.glob("*-*.md"))


def test_readme_fits_and_its_chart_is_drawn_from_the_records():
    assert len(README.splitlines()) <= 120
    assert chart.draw() == (ROOT / "docs" / "chart.svg").read_text(), "run: warploom bench chart"
