"""Runs every fault scenario and fills the table of docs/faults.md.

python bench/faults.py              runs all, writes bench/results/faults.json and the table (minutes)
python bench/faults.py NAME ...     runs some of them; the others keep their rows
python bench/faults.py --out FILE   writes there and prints the table: the page shows the committed file
python bench/faults.py --table      writes the table from the results that are there
python bench/faults.py --check      exit code 1 where the page says something else than the results
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench.fault_scenarios import SCENARIOS, Bench  # noqa: E402
from bench.measure import machine  # noqa: E402
from sivae_fast.files import write_text  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "faults.json"
PAGE = ROOT / "docs" / "faults.md"
START, END = "<!-- table: python bench/faults.py -->\n", "<!-- end of table -->"


def measure(names: list[str], out: Path) -> None:
    """Runs the scenarios; each row is written as soon as it is there. Raises where one does not hold."""
    rows = json.loads(out.read_text())["rows"] if out.is_file() else {}
    with tempfile.TemporaryDirectory() as folder:
        bench, where = Bench(Path(folder)), machine("cpu")
        commit = where.pop("commit")  # asked once: the first row written changes the tree
        for name in names:
            rows[name] = {**SCENARIOS[name](bench), "commit": commit}
            print(name, json.dumps(rows[name]), flush=True)
            ordered = {name: rows[name] for name in SCENARIOS if name in rows}
            found = {"command": "python bench/faults.py", **where, "rows": ordered}
            write_text(out, json.dumps(found, indent=1) + "\n")


def table(results: Path = RESULTS) -> str:
    lines = [
        "| fault | what happens | seconds until training goes on | images trained again |",
        "|---|---|---|---|",
    ]
    for row in json.loads(results.read_text())["rows"].values():
        seconds = f"{row['seconds']:.0f}" if row["seconds"] else "-"
        lines.append(f"| {row['injected']} | {row['happened']} | {seconds} | {row['images_lost']} |")
    return "\n".join(lines) + "\n"


def filled(text: str) -> str:
    """The page with the table of the results between its marks."""
    before, rest = text.split(START)
    return before + START + table() + END + rest.split(END)[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SCENARIOS)}")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS, help="default: the committed file")
    options = parser.parse_args()
    if unknown := set(options.names) - set(SCENARIOS):
        parser.error(f"unknown scenario {min(unknown)}: there are {', '.join(SCENARIOS)}")
    if options.out.resolve() != RESULTS.resolve():
        if options.table or options.check:
            parser.error("--table and --check are about docs/faults.md: without --out")
        measure(options.names or list(SCENARIOS), options.out)
        print(table(options.out))
        return 0
    text = PAGE.read_text(encoding="utf-8")
    if options.check:
        if filled(text) == text:
            return 0
        print("the table of docs/faults.md is not that of bench/results/faults.json: --table writes it")
        return 1
    if not options.table:
        measure(options.names or list(SCENARIOS), options.out)
    write_text(PAGE, filled(text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
