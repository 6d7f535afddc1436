"""The command line of a script, made from the knobs of config.py. Standard library only: -h is quick."""

import argparse
import signal

from config import FIELDS, UserError, changed, make_config, unknown
from shell.signals import KEPT, guarded, is_guest, stop

SECTIONS = {  # of the help: the first knob of each -> its title
    "preset": "most used", "device": "run", "tiles": "data", "weights_path": "backbone and extraction",
    "n_coupling_blocks": "flow", "normalize": "training", "score": "scoring",
}  # fmt: skip


class OneLineParser(argparse.ArgumentParser):
    """argparse, but a mistake is one line, and until ``guarded`` Ctrl-C leaves no traceback of an import."""

    def error(self, message):
        stop(message)

    def parse_known_args(self, args=None, namespace=None):
        parsed = super().parse_known_args(args, namespace)
        if args is None and not is_guest() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        return parsed


def from_command_line(description, argv=None):
    """The configuration of a script's command line; ``-h`` prints the knobs, the most used ones first, and
    exits. A mistake ends the script with one line."""
    parser = OneLineParser(
        description=description,
        usage="%(prog)s [--knob VALUE ...]",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, field in FIELDS.items():
        if name in SECTIONS:
            group = parser.add_argument_group(SECTIONS[name])
        text, choices = field.metadata["help"].replace("%", "%%"), field.metadata["choices"]
        if not all(choice in text for choice in choices):
            text += f" ({', '.join(choices)})"
        shown = "none" if field.default is None else field.default
        flag = {"nargs": "?", "const": True} if field.type is bool else {}
        group.add_argument(f"--{name}", metavar="VALUE", help=f"{text} [{shown}]", **flag)
    given, rest = parser.parse_known_args(argv)
    try:
        if rest:
            raise UserError(unknown("knob", rest[0].split("=")[0], [f"--{name}" for name in FIELDS]))
        return make_config(vars(given))
    except UserError as mistake:
        stop(mistake)


def run_script(main, config):
    """Run ``main(config)``, ``guarded``: print the configuration in effect first."""

    def shown():
        settings = ", ".join(f"{name} {value}" for name, value in changed(config).items() if name != "preset")
        print(f"preset {config.preset}" + (f"; {settings}" if settings else ""), flush=True)
        main(config)

    guarded(shown, told=KEPT)
