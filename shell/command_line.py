"""The command line of a script, made from the knobs of config.py. Standard library only: -h is quick."""

import argparse
import functools
import os
import shlex
import sys
from pathlib import Path

from config import FIELDS, UserError, changed, make_config, unknown
from shell.signals import KEPT, before_imports, guarded, stop
from shell.values import parse_value

SECTIONS = {  # of the help: the first knob of each -> its title
    "preset": "most used",
    "device": "run",
    "tiles": "data",
    "weights_path": "backbone and extraction",
    "n_coupling_blocks": "flow",
    "normalize": "training",
    "score": "scoring",
}


class OneLineParser(argparse.ArgumentParser):
    """argparse, but a mistake is one line."""

    def error(self, message):
        stop(message)

    def parse_or_stop(self, argv=None):
        """``parse_args``; until ``guarded`` a signal to end is one line, too."""
        parsed = self.parse_args(argv)
        if argv is None:
            before_imports()
        return parsed


def build_parser(description):
    """A parser with every knob, its default and its meaning, in the order of config.py: the most used ones
    first."""
    parser = OneLineParser(
        description=description,
        usage="%(prog)s [--knob VALUE ...]",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, field in FIELDS.items():
        if name in SECTIONS:
            group = parser.add_argument_group(SECTIONS[name])
        add_knob(group, field)
    return parser


def add_knob(group, field):
    """Add a knob's argument to a section of the parser."""
    text, choices = field.metadata["help"].replace("%", "%%"), field.metadata["choices"] or ()
    if not all(choice in text for choice in choices):
        text += f" ({', '.join(choices)})"
    shown = "none" if field.default is None else field.default
    group.add_argument(
        f"--{field.name}",
        metavar="VALUE",
        type=functools.partial(parse_value, field),
        default=argparse.SUPPRESS,
        help=f"{text} [{shown}]",
        **({"nargs": "?", "const": True} if field.type is bool else {}),
    )


def add_weights_path(parser):
    """Add the argument that says where the weights file of a fit with ``weights_path`` is now."""
    parser.add_argument(
        "--weights_path",
        type=Path,
        metavar="FILE",
        help="of a fit with --weights_path: where that file is now [where it was, or beside the checkpoint]",
    )


def from_command_line(description, argv=None):
    """The configuration of a script's command line; ``-h`` prints the knobs and exits. A mistake ends the
    script with one line."""
    try:
        given, rest = build_parser(description).parse_known_args(argv)
        if rest and rest[0].startswith("-"):
            raise UserError(unknown("knob", rest[0].split("=")[0], [f"--{name}" for name in FIELDS]))
        if rest:
            raise UserError(f"expected --knob, got {rest[0]!r}")
        made = make_config(vars(given))
    except UserError as mistake:
        stop(mistake)
    if argv is None:
        before_imports()
    return made


def run_script(main, config):
    """Run ``main(config)``: print the configuration in effect first, and turn a user's mistake into one line
    and exit status 2."""

    def shown():
        settings = ", ".join(f"{name} {value}" for name, value in changed(config).items() if name != "preset")
        print(f"preset {config.preset}" + (f"; {settings}" if settings else ""), flush=True)
        main(config)

    guarded(shown, told=KEPT)


def command_line() -> str:
    """The command that runs this script as it was run, for a shell."""
    return "python " + shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]])
