"""Read runs that were reported: their list, the table of one, or two side by side.

python report.py               every run in runs/: what it was, its mean AUROC, when
python report.py RUN           its table
python report.py RUN_A RUN_B   side by side: AUROC per class, paired difference, knobs that differ
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # under PYTHONSAFEPATH, too

from shell.command_line import OneLineParser
from shell.signals import guarded, stop


def parse_arguments() -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="the name of a run in runs/, or its folder")
    arguments = parser.parse_args()
    if len(arguments.runs) > 2:
        stop(f"expected two runs at most, got {len(arguments.runs)}")
    return arguments


if __name__ == "__main__":  # parse before the slow imports
    ARGUMENTS = parse_arguments()

from reporting import compare
from reporting.report import read_summary, terminal_table


def main(arguments: argparse.Namespace) -> None:
    root, names = Path("runs"), arguments.runs
    if not names:
        print(compare.list_runs(root))
    elif len(names) == 1:
        print(terminal_table(read_summary(compare.find_run(names[0], root))))
    else:
        print(compare.compare(names[0], names[1], root))


if __name__ == "__main__":
    guarded(main, ARGUMENTS)
