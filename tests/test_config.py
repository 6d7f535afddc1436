"""The knobs: on the command line, in presets, checked, and read by some script."""

import re
import shlex

import pytest
from conftest import new_process, script
from test_imports import FILES

import config
from config import FIELDS, Config, make_config
from shell.command_line import from_command_line


def parsed(*arguments) -> Config:
    return from_command_line("test", list(arguments))


def mistake(capsys, *arguments) -> str:
    """The one line that a wrong command line leaves on stderr."""
    with pytest.raises(SystemExit) as stopped:
        parsed(*arguments)
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error:") and captured.err.count("\n") == 1
    return captured.err


# ---------------------------------------------------------------- -h
def test_help_lists_every_knob_with_its_default(tmp_path):
    """In the order of config.py, in its sections, with its choices."""
    shown = script("main.py", "-h", cwd=tmp_path).stdout
    assert max(map(len, shown.splitlines())) <= 100 and list(tmp_path.iterdir()) == []
    places = [
        shown.index(f"\n{title}:\n") for title in ("most used", "run", "data", "backbone and extraction")
    ]
    assert places == sorted(places)
    blocks = dict(re.findall(r"^  --(\w+)(.*?)(?=^  --|^\S|\Z)", shown, re.M | re.S))
    assert list(blocks) == list(FIELDS)
    for name, field in FIELDS.items():
        text = " ".join(blocks[name].split())
        assert len(text) > 20 and text.endswith(f"[{str(field.default).replace('None', 'none')}]"), text
        assert all(re.search(rf"\b{re.escape(choice)}", text) for choice in field.metadata["choices"]), text


@pytest.mark.parametrize("name", ["extractor.py", "train.py", "main.py"])
def test_help_is_quick(name, tmp_path):
    """-h and a mistake answer before anything slow is imported: a stub that fails on import stands in for
    torch."""
    for slow in ("torch", "numpy", "timm", "sklearn"):
        (tmp_path / f"{slow}.py").write_text("raise SystemExit('slow import')\n")
    for arguments, status in ((["-h"], 0), (["--seed", "first"], 2)):
        done = new_process(name, *arguments, cwd=tmp_path, PYTHONPATH=str(tmp_path))
        assert done.returncode == status and "slow import" not in done.stdout + done.stderr


# ---------------------------------------------------------------- precedence
def test_command_line_before_preset_before_default():
    assert parsed() == make_config({"preset": "paper"}) == Config() and Config().fusion == "hilo"
    assert parsed("--preset", "released").fusion == "class_attention"
    assert parsed("--preset", "released", "--fusion", "none").fusion == "none"
    assert parsed("--fusion", "hilo", "--preset", "released").fusion == "hilo", "the default, too, if named"


# ---------------------------------------------------------------- one place for one decision
@pytest.mark.parametrize("name", [name for name in FIELDS if name != "preset"])
def test_every_knob_is_read(name):
    """A knob that nothing reads would be a promise not kept."""
    sources = {module: path.read_text() for module, path in FILES.items() if module != "config"}
    assert any(re.search(rf"\b(?:config|settings|args)\.{name}\b", text) for text in sources.values())


def test_names_are_those_of_the_registries():
    from detector.detector import DETECTORS
    from detector.normalization import NORMALIZATIONS
    from freq_fusion import FUSIONS
    from images import layouts, published

    assert sorted(config.DATASETS) == sorted(["digits", *published.FORMS, *layouts.READERS])
    assert set(config.FUSIONS) == set(FUSIONS)
    assert set(config.NORMALIZATIONS) == {"auto", *NORMALIZATIONS} and set(config.SCORES) == set(DETECTORS)


# ---------------------------------------------------------------- values from text
@pytest.mark.parametrize(
    "name, text, value",
    [
        ("img_size", "384X256", (384, 256)), ("img_size", "none", None), ("img_size", "Auto", "auto"),
        ("pixel_norm", "0.1,0.2,0.3,1,2,3", (0.1, 0.2, 0.3, 1.0, 2.0, 3.0)), ("fc_internal", "12", 12),
        ("dataset", "visa", "VisA"), ("dataset_path", "/a b/ü", "/a b/ü"), ("alpha", "1", 1.0),
        ("baselines", "false", False), ("restart", "TRUE", True),
    ],
)  # fmt: skip
def test_values(name, text, value):
    for arguments in ([f"--{name}", text], [f"--{name}={text}"]):
        got = getattr(parsed(*arguments), name)
        assert got == value and type(got) is type(value)
    made = parsed("--restart", f"--{name}", text)
    assert made.restart is True and getattr(made, name) == value, "a flag needs no value"


@pytest.mark.parametrize(
    "arguments, told",
    [
        ("--lr_inti 1", "--lr_inti.*did you mean --lr_init"),
        ("--lr 1", "unknown knob '--lr'"),  # no abbreviations
        ("cat", "cat"),
        ("--seed", "seed"),
        ("--seed 1.5", "seed.*whole number.*1.5"),
        ("--seed -1", "seed.*from 0 .*-1"),
        ("--lr_init nan", "lr_init.*nan"),
        ("--restart maybe", "restart.*True or False.*maybe"),
        ("--fusion hillo", "fusion.*did you mean hilo"),
        ("--preset papre", "did you mean paper"),
        ("--img_size 1x2x3", "img_size"),
        ("--pixel_norm 0.5,0.5,0.5,1,1,0", "pixel_norm"),
        ("--token_grid releasedfull", "token_grid.*releasedfull"),
        ("--score joined", "joined.*places"),
        ("--window 1000000000", "window"),
        ("--n_coupling_blocks 1000000000", "n_coupling_blocks"),
        ("--batch_size 100000000000000000000", "batch_size"),
        ("--img_size 100000x8", "img_size"),
        ("--centre_pool 1e-320", "centre_pool"),
        ("--clamp 1e300", "clamp"),
        ("--threads 10000", "threads"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, told):
    assert re.search(told, mistake(capsys, *shlex.split(arguments)))
