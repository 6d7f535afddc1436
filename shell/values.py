"""Values of knobs from texts, as a command line gives them. Standard library only."""

import dataclasses
import typing

from config import (
    KINDS,
    Config,
    ImageSize,
    Six,
    UserError,
    auto_pixels,
    check,
    check_folder_name,
    plain_type,
    unknown_knob,
)


def parse_value(field, text):
    """The value of a knob from its command-line text. Raises UserError with what was expected."""
    kind = plain_type(field.type)
    if not isinstance(text, str):  # what argparse makes of --knob=--
        raise UserError(f"{field.name}: expected a value, got '--'")
    if type(None) in typing.get_args(field.type) and text.lower() == "none":
        return None
    try:
        if kind is bool:
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[
                text.lower()
            ]
        if field.type == ImageSize and auto_pixels(text.lower()):
            return text.lower()
        if field.type == ImageSize:
            sides = [int(side) for side in text.lower().split("x")]
            return checked_length(sides * 2 if len(sides) == 1 else sides, 2)
        if field.type == Six | None:
            return checked_length([float(part) for part in text.split(",")], 6)
        if field.name == "modelname":
            check_folder_name("modelname", text)
        spelt = {str(choice).lower(): choice for choice in field.metadata["choices"] or ()}
        return spelt.get(text.lower()) or kind(text)
    except (KeyError, ValueError):
        raise UserError(f"{field.name}: expected {KINDS[kind]}, got {text!r}") from None


def parse_values(texts):
    """{knob: text} -> {knob: value}. Raises UserError on an unknown knob or a value that does not fit."""
    fields = {field.name: field for field in dataclasses.fields(Config)}
    for name in texts:
        if name not in fields:
            raise UserError(unknown_knob(name, fields))
    return {name: parse_value(fields[name], text) for name, text in texts.items()}


def parse_sweep(text):
    """``fusion=none,hilo;dataset=digits`` -> {"fusion": ["none", "hilo"], "dataset": ["digits"]}. Raises
    UserError."""
    sweep = {}
    for part in text.split(";"):
        name, equals, values = part.strip().partition("=")
        if not equals or not values:
            raise UserError(f"sweep: expected knob=value,value;knob=value,value, got {text!r}")
        fields = {field.name: field for field in dataclasses.fields(Config)}
        if name not in fields:
            raise UserError(unknown_knob(name, fields))
        if name in ("preset", "modelname", "sweep"):
            raise UserError(f"sweep: {name} cannot be swept; run the script once per {name}")
        sweep[name] = [value.strip() for value in values.split(",")]
        for value in sweep[name]:
            check(fields[name], parse_values({name: value})[name])
    return sweep


def checked_length(numbers, length):
    if len(numbers) != length:
        raise ValueError(f"expected {length} numbers")
    return tuple(numbers)


def class_names(text):
    """The class names in the knob class_name, separated by commas: a backslash takes the next character as it
    is, so that a class may have a comma (``\\,``) or be called all (``\\all``)."""
    names, escaped = [""], False
    for c in text:
        if escaped or c not in "\\,":
            names[-1] += c
            escaped = False
        elif c == "\\":
            escaped = True
        else:
            names.append("")
    return names
