"""Values of knobs from texts, as a command line gives them. Standard library only."""

import re

from config import KINDS, ImageSize, UserError, field_of, is_optional, plain_type

TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def parse_value(field, text):
    """The value of a knob from its command-line text. Raises UserError with what was expected."""
    kind, spelt = plain_type(field.type), text.lower()
    if spelt == "none" and is_optional(field):
        return None
    if spelt == "auto" and field.type == ImageSize:
        return spelt
    try:
        if kind is bool:
            return TRUTH[spelt]
        if field.type == ImageSize:
            sides = [int(side) for side in spelt.split("x")]
            return tuple(sides * 2 if len(sides) == 1 else sides)
        if kind is tuple:
            return tuple(float(part) for part in text.split(","))
        choices = {choice.lower(): choice for choice in field.metadata["choices"] or ()}
        return choices.get(spelt) or kind(text)
    except (KeyError, ValueError):
        raise UserError(f"{field.name}: expected {KINDS[kind]}, got {text!r}") from None


def parse_values(texts):
    """{knob: text} -> {knob: value}. Raises UserError on an unknown knob or a value that does not fit."""
    return {name: parse_value(field_of(name), text) for name, text in texts.items()}


def class_names(text):
    """The class names in the knob class_name, separated by commas: a backslash takes the next character as it
    is, so that a class may have a comma (``\\,``) or be called all (``\\all``)."""
    parts = re.findall(r"(?:\\.|[^\\,])+", text, re.DOTALL)
    return [re.sub(r"\\(.)", r"\1", part, flags=re.DOTALL) for part in parts] or [text]
