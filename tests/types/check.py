"""Type check: no errors in what users touch, and elsewhere no more a folder than `ratchet.json` says.

    python tests/types/check.py             # `make lint` runs it
    python tests/types/check.py --lower     # write the new numbers, where they have fallen

The checker is basedpyright (pyright with a Node.js of its own, from PyPI), in pyright's standard mode.
"""

import argparse
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
RATCHET = Path(__file__).with_name("ratchet.json")
SERVING = ("llm", "options", "outputs", "sampling_params", "engine")
CLEAN = (
    *("__init__.py", "tokenizer/", "engine/config.py", "engine/data/", "tests/types/"),
    *(f"engine/serving/{name}.py" for name in SERVING),
)


def find_errors() -> list[tuple[str, str]]:
    """The file and the message of each error."""
    link = ROOT / "build" / "path" / "warploom"
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.exists():
        link.symlink_to(ROOT, target_is_directory=True)
    command = [sys.executable, "-m", "basedpyright", "--outputjson", "--pythonpath", sys.executable]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    lines = []
    for each in json.loads(answer)["generalDiagnostics"]:
        if each["severity"] == "error":
            name = Path(each["file"]).resolve().relative_to(ROOT.resolve()).as_posix()
            line, message = each["range"]["start"]["line"] + 1, each["message"].splitlines()[0]
            lines.append((name, f"{name}:{line}: {message} ({each.get('rule')})"))
    return lines


def main() -> int:
    """Print what is new, and return 1 if there is any."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lower", action="store_true", help="write what has fallen to ratchet.json")
    lower = parser.parse_args().lower
    allowed = json.loads(RATCHET.read_text())
    errors = find_errors()
    for _, text in (shown := [each for each in errors if each[0].startswith(CLEAN)]):
        print(text)
    counts = Counter(Path(name).parent.as_posix() for name, _ in errors if not name.startswith(CLEAN))
    risen = [folder for folder, count in sorted(counts.items()) if count > allowed.get(folder, 0)]
    for folder in risen:
        print(f"{folder}: {counts[folder]} type errors, {allowed.get(folder, 0)} allowed:")
        print(*(f"  {text}" for name, text in errors if Path(name).parent.as_posix() == folder), sep="\n")
    if lower:
        fallen = {folder: min(counts[folder], most) for folder, most in allowed.items() if counts[folder]}
        RATCHET.write_text(json.dumps(fallen, indent=2) + "\n")
    print(f"types: {len(shown)} errors where none may be, {counts.total()} elsewhere, {sum(allowed.values())} allowed")
    return 1 if shown or risen else 0


if __name__ == "__main__":
    sys.exit(main())
