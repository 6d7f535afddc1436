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
from shell.signals import guarded


def parse_arguments() -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", help="the name of a run in runs/, or its folder")
    parser.add_argument("other", nargs="?", help="that of the run to compare it with")
    return parser.parse_or_stop()


if __name__ == "__main__":  # parse before the slow imports
    ARGUMENTS = parse_arguments()

from reporting import compare
from reporting.report import read_summary, terminal_table


def main(arguments: argparse.Namespace) -> None:
    root, run, other = Path("runs"), arguments.run, arguments.other
    if other:
        print(compare.compare(run, other, root))
    elif run:
        print(terminal_table(read_summary(compare.find_run(run, root))))
    else:
        print(compare.list_runs(root))


if __name__ == "__main__":
    guarded(main, ARGUMENTS)
