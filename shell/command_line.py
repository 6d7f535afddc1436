"""The command line of a script, made from the knobs of config.py. Standard library only: -h is quick."""

import argparse
import dataclasses
import os
import re
import shlex
import sys
from pathlib import Path

from config import Config, UserError, changed, make_config, unknown_knob
from shell.signals import KEPT, before_imports, guarded, show_any_name, stop
from shell.values import parse_sweep, parse_values

# The knobs that a first run needs, at the head of the help.
MOST_USED = (
    "preset",
    "dataset",
    "dataset_path",
    "class_name",
    "extractor",
    "modelname",
    "n_seeds",
    "threads",
    "restart",
    "sweep",
)
# The sections of the help: the first knob of each -> its title.
SECTIONS = {
    "preset": "run",
    "dataset": "data",
    "extractor": "backbone and extraction",
    "n_coupling_blocks": "flow",
    "normalize": "training",
    "score": "scoring",
}


class OneLineParser(argparse.ArgumentParser):
    """argparse, but a mistake is one line, and the nearest knob is named."""

    def error(self, message):
        raise UserError(message)

    def parse_or_stop(self, argv=None):
        """``parse_args``; a mistake ends the script with one line, and so do signals until ``guarded``."""
        try:
            parsed = self.parse_args(argv)
        except UserError as mistake:
            stop(mistake)
        if argv is None:
            before_imports()
        return parsed


def build_parser(description, script="main.py"):
    """A parser with every knob that ``script`` reads, its default and its meaning: the most used ones, then
    the sections of the help."""
    parser = OneLineParser(
        description=description,
        usage="%(prog)s [--knob VALUE ...]",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    most_used = parser.add_argument_group("most used")
    by_name = {field.name: field for field in dataclasses.fields(Config)}
    read = [name for name, field in by_name.items() if script in field.metadata["scripts"]]
    for name in MOST_USED:
        if name in read:
            add_knob(most_used, by_name[name])
    group = parser
    for name, field in by_name.items():
        if name in SECTIONS:
            group = parser.add_argument_group(SECTIONS[name])
        if name in read and name not in MOST_USED:
            add_knob(group, field)
    return parser


def add_weights_path(parser):
    """Add the argument that says where the weights file of a fit with ``weights_path`` is now."""
    parser.add_argument(
        "--weights_path",
        type=Path,
        metavar="FILE",
        help="of a fit with --weights_path: where that file is now [where it was, or beside the checkpoint]",
    )


def add_knob(group, field):
    """Add a knob's argument to a section of the parser."""
    text = field.metadata["help"].replace("%", "%%")
    if field.metadata["choices"] and not all(str(choice) in text for choice in field.metadata["choices"]):
        text += f" ({', '.join(field.metadata['choices'])})"
    shown = "none" if field.default is None else field.default
    optional_flag = {"nargs": "?", "const": "True"} if field.type is bool else {}
    group.add_argument(
        f"--{field.name}",
        metavar="VALUE",
        default=argparse.SUPPRESS,
        help=f"{text} [{shown}]",
        **optional_flag,
    )


def from_command_line(description, argv=None, script="main.py"):
    """The configuration of a script's command line; ``-h`` prints the knobs it reads and exits. A mistake
    ends the script with one line."""
    try:
        given, rest = build_parser(description, script).parse_known_args(argv)
        if rest:
            raise UserError(unexpected(rest[0], script))
        made = make_config(parse_values(vars(given)))
        if made.sweep:
            parse_sweep(made.sweep)
    except UserError as mistake:
        stop(mistake)
    if argv is None:
        before_imports()
    return made


def unexpected(argument, script):
    """The line for an argument that ``script`` does not take: no knob, or one that other scripts read."""
    if not argument.startswith("--"):
        return f"expected --knob value, got {argument!r}"
    name = argument.split("=")[0]
    known = {f"--{field.name}": field.metadata["scripts"] for field in dataclasses.fields(Config)}
    if name not in known:
        return unknown_knob(name, [knob for knob, scripts in known.items() if script in scripts])
    return f"{script} does not read {name}, only {' and '.join(known[name])}; leave it out"


def run_script(main, config):
    """Run ``main(config)``: print the configuration in effect first, and turn a user's mistake into one line
    and exit status 2."""
    show_any_name()
    settings = ", ".join(f"{name} {value}" for name, value in changed(config).items() if name != "preset")
    print(f"preset {config.preset}" + (f"; {settings}" if settings else ""), flush=True)
    guarded(main, config, told=KEPT)


def command_line() -> str:
    """The command that runs this script as it was run, for a shell."""
    return "python " + shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]])


def to_go_on() -> str:
    """The command that goes on with what is kept: the same without ``--restart``, which would drop it."""
    return re.sub(r" --restart([ =]\w+)?(?= -|$)", "", command_line())
