"""The knobs: on the command line, in presets, checked, read by some script, and edited in the file itself."""

import dataclasses
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, forked, new_process, script
from test_imports import FILES, reached_from

import config
from config import PRESETS, Config, UserError, make_config
from shell import command_line
from shell.command_line import MOST_USED, build_parser, from_command_line
from shell.values import parse_sweep, parse_values

SCRIPTS = ("extractor.py", "train.py", "main.py")
FIELDS = dataclasses.fields(Config)
NAMES = [field.name for field in FIELDS]


def parsed(*arguments) -> Config:
    return from_command_line("test", list(arguments))


def mistake(capsys, *arguments) -> str:
    """The one line that a wrong command line leaves on stderr."""
    with pytest.raises(SystemExit) as stopped:
        parsed(*arguments)
    assert stopped.value.code not in (0, None)
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error:") and captured.err.count("\n") == 1
    return captured.err


# ---------------------------------------------------------------- -h
def as_shown(default) -> str:
    return "none" if default is None else str(default)


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_lists_every_knob_with_its_default(name, tmp_path):
    done = script(name, "-h", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "" and list(tmp_path.iterdir()) == []
    blocks = dict(re.findall(r"^  --(\w+)(.*?)(?=^  --|^\S|\Z)", done.stdout, re.M | re.S))
    read = [field for field in FIELDS if name in field.metadata["scripts"]]
    assert set(blocks) == {field.name for field in read}
    for field in read:
        text = " ".join(blocks[field.name].split())
        assert text.endswith(f"[{as_shown(field.default)}]"), f"--{field.name}: {text}"
        for choice in field.metadata["choices"] or ():
            assert str(choice) in text, f"--{field.name} does not name its choice {choice}"


@pytest.mark.parametrize("name", [*SCRIPTS, "predict.py", "report.py", "export.py"])
def test_help_fits_a_terminal(name, tmp_path):
    shown = script(name, "-h", cwd=tmp_path).stdout
    assert max(map(len, shown.splitlines())) <= 100 and "usage: " in shown


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_is_quick(name, tmp_path):
    """-h and a mistake answer before anything slow is imported: a stub that fails on import stands in for
    torch."""
    for slow in ("torch", "numpy", "timm", "sklearn"):
        (tmp_path / f"{slow}.py").write_text("raise SystemExit('slow import')\n")
    for arguments, status in ((["-h"], 0), (["--lr_init", "fast"], 2)):
        done = new_process(name, *arguments, cwd=tmp_path, PYTHONPATH=str(tmp_path))
        assert done.returncode == status and "slow import" not in done.stdout + done.stderr


def test_config_needs_the_standard_library_only():
    code = "import sys; import config; config.make_config({}); "
    code += "assert not {'torch', 'numpy', 'timm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_edited_default_shows(tmp_path):
    """config.py is the place to edit: a default changed there is the default of -h and of the
    configuration."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    shutil.copytree(ROOT / "shell", tmp_path / "shell")
    text = (tmp_path / "config.py").read_text()
    edited, count = re.subn(r"(?m)^(    lr_init: float = fit\()[^,]+,", r"\g<1>0.0123,", text)
    assert count == 1
    (tmp_path / "config.py").write_text(edited)
    shown = new_process("main.py", "-h", cwd=tmp_path, code_root=tmp_path).stdout
    assert "[0.0123]" in shown[shown.rindex("--lr_init ") :].split("--lr_schedule")[0]
    code = "import config; print(config.make_config({}).lr_init)"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout.strip()
        == "0.0123"
    )


@pytest.mark.parametrize(
    "given, wanted",
    [
        ("--restart", ""),
        ("--restart --seed 3", "--seed 3"),
        ("--seed 3 --restart True --window 2", "--seed 3 --window 2"),
        ("--restart=True --modelname x", "--modelname x"),
        ("--modelname --restart", "--modelname"),
        ("--modelname 'a --restartb'", "--modelname 'a --restartb'"),
    ],
)
def test_the_command_that_goes_on_drops_nothing(given, wanted, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/x/main.py", *shlex.split(given)])
    assert command_line.to_go_on() == f"python main.py {wanted}".strip()


# ---------------------------------------------------------------- precedence
def test_default_preset_command_line():
    preset, knob, value = next(
        (p, k, v) for p, values in PRESETS.items() for k, v in values.items() if k == "fusion"
    )
    default, other = Config().fusion, next(f for f in config.FUSIONS if f not in (Config().fusion, value))
    assert value != default
    assert parsed().fusion == default
    assert parsed("--preset", preset).fusion == value
    for arguments in (["--preset", preset, f"--{knob}", other], [f"--{knob}", other, "--preset", preset]):
        assert parsed(*arguments).fusion == other, "the order on the command line does not matter"
    assert parsed("--preset", preset, "--fusion", default).fusion == default, (
        "the default named on the command line wins too"
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_presets(preset):
    made = make_config({"preset": preset})
    assert made.preset == preset
    for name, value in PRESETS[preset].items():
        assert name in NAMES and getattr(made, name) == value
    others = [f for f in FIELDS if f.name not in PRESETS[preset] and f.name != "preset"]
    assert all(getattr(made, f.name) == f.default for f in others)


def test_paper_preset_is_the_defaults():
    assert make_config({"preset": "paper"}) == Config() == parsed()


def test_every_preset_is_named_in_the_help():
    text = next(f for f in FIELDS if f.name == "preset").metadata["help"]
    assert all(re.search(rf"\b{name}\b", text) for name in PRESETS)
    named = re.match(r"([\w, ]+?):", text)[1].replace(" or ", ", ").split(",")
    assert {name.strip() for name in named} == set(PRESETS), "the help names presets that are not there"


# ---------------------------------------------------------------- the configuration object
def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 3
    assert dataclasses.replace(Config(), seed=3).seed == 3


def test_replace_checks_again():
    with pytest.raises(UserError):
        dataclasses.replace(Config(), clamp=-1.0)


def test_changed():
    assert config.changed(Config()) == {}
    assert config.changed(Config(seed=4, img_size=(8, 9))) == {"seed": 4, "img_size": (8, 9)}


@pytest.mark.parametrize("name", NAMES)
def test_every_knob_is_read(name):
    """A knob that no script reads would be a promise not kept."""
    sources = {module: path.read_text() for module, path in FILES.items() if module != "config"}
    sources["config.py"] = (
        (ROOT / "config.py")
        .read_text()
        .split("# ---------------------------------------------------------------- checks")[1]
    )
    if name == "preset":
        assert "PRESETS[preset]" in sources["config.py"]
        return
    assert any(
        re.search(rf"\b(?:config|CONFIG|settings|args)\.{name}\b", text) for text in sources.values()
    ), f"no script reads config.{name}"


@pytest.mark.parametrize("field", FIELDS, ids=NAMES)
def test_every_knob_has_help(field):
    assert len(field.metadata["help"]) > 10 and "\n" not in field.metadata["help"]


# read in what train.py and main.py call of a module that extractor.py also imports
NOT_BY_EXTRACTOR = {"class_name", "batch_size", "n_coupling_blocks", "fc_internal", "fusion"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_of_every_knob(script):
    """A script takes the knobs that it reads, in its own file or in one that it imports, and no others."""
    modules = reached_from(script.removesuffix(".py")) - {"config"}
    text = "\n".join(FILES[name].read_text() for name in modules)
    read = set(re.findall(r"\b[cC](?:onfig|ONFIG)\.([a-z]\w*)", text)) & set(NAMES) | {"preset"}
    if script == "extractor.py":
        read -= NOT_BY_EXTRACTOR
    taken = {field.name for field in FIELDS if script in field.metadata["scripts"]}
    assert taken == read, "say in config.py which scripts read the knob: scripts=FITTING, say"


@pytest.mark.parametrize(
    "script, name", [("train.py", "n_seeds"), ("train.py", "sweep"), ("extractor.py", "lr_init")]
)
def test_knobs_that_a_script_does_not_read_are_refused(script, name, capsys):
    with pytest.raises(SystemExit):
        from_command_line("test", [f"--{name}=1"], script)
    line = capsys.readouterr().err
    assert f"{script} does not read --{name}" in line and "main.py" in line and line.count("\n") == 1


# ---------------------------------------------------------------- values from text
@pytest.mark.parametrize(
    "name, text, value",
    [
        ("img_size", "224", (224, 224)),
        ("img_size", "384x256", (384, 256)),
        ("img_size", "384X256", (384, 256)),
        ("img_size", "none", None),
        ("img_size", "Auto", "auto"),
        ("img_size", "AUTO:9", "auto:9"),
        ("pixel_norm", "0.1,0.2,0.3,1,2,3", (0.1, 0.2, 0.3, 1.0, 2.0, 3.0)),
        ("pixel_norm", "none", None),
        ("fc_internal", "none", None),
        ("worker", "3/16", "3/16"),
        ("token_grid", "released8", "released8"),
        ("fc_internal", "12", 12),
        ("dataset_path", "None", None),
        ("dataset_path", "/a b/ü", "/a b/ü"),
        ("feature_path", "x", "x"),
        ("lr_init", "1e-3", 1e-3),
        ("alpha", "1", 1.0),
        ("token_grid", "8", "8"),
        ("class_name", "cat,dog", "cat,dog"),
        ("baselines", "False", False),
        ("baselines", "no", False),
        ("baselines", "0", False),
        ("restart", "true", True),
        ("restart", "YES", True),
        ("restart", "1", True),
    ],
)
def test_values(name, text, value):
    for arguments in ([f"--{name}", text], [f"--{name}={text}"]):
        got = getattr(parsed(*arguments), name)
        assert got == value and type(got) is type(value)


def test_flag_without_a_value():
    assert parsed("--restart").restart is True
    made = parsed("--restart", "--seed", "3", "--baselines")
    assert made.restart is True and made.seed == 3 and made.baselines is True


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--lr_inti", "1"], ("--lr_inti", "--lr_init")),
        (["--lr", "1"], ("--lr",)),  # no abbreviations
        (["--nonsense_xyz"], ("--nonsense_xyz",)),
        (["cat"], ("cat",)),
        (["--seed"], ("seed",)),
        (["--seed", "1.5"], ("seed", "1.5", "whole number")),
        (["--seed", "-1"], ("seed", "-1", "from 0")),
        (["--alpha", "1.5"], ("alpha", "1.5")),
        (["--lr_init", "nan"], ("lr_init", "finite")),
        (["--lr_init", "inf"], ("lr_init", "finite")),
        (["--lr_init", "fast"], ("lr_init", "fast")),
        (["--clamp", "0"], ("clamp",)),
        (["--holdout", "0.6"], ("holdout", "0.6")),
        (["--restart", "maybe"], ("restart", "maybe", "True or False")),
        (["--fusion", "hillo"], ("fusion", "hillo", "hilo")),
        (["--dataset", "cifar"], ("dataset", "cifar", "cifar10")),
        (["--preset", "papre"], ("preset", "papre", "paper")),
        (["--score", ""], ("score",)),
        (["--img_size", "1x2x3"], ("img_size", "1x2x3")),
        (["--img_size", "big"], ("img_size", "big")),
        (["--img_size", "auto:0"], ("img_size", "auto:0")),
        (["--img_size", "auto:99999999"], ("img_size", "auto:99999999")),
        (["--pixel_norm", "0.5,0.5,0.5"], ("pixel_norm", "0.5,0.5")),
        (["--pixel_norm", "0.5,0.5,0.5,1,1,x"], ("pixel_norm",)),
        (["--worker", "3"], ("worker", "'3'")),
        (["--worker", "16/16"], ("worker", "16/16")),
        (["--token_grid", "0"], ("token_grid",)),
        (["--token_grid", "eight"], ("token_grid", "eight")),
        (["--token_grid", "³"], ("token_grid",)),
        (["--token_grid", "released"], ("token_grid",)),
        (["--token_grid", "releasedfull"], ("token_grid", "releasedfull")),
        (["--patience", "3"], ("patience", "holdout")),
        (["--fc_internal", "0"], ("fc_internal", "from 1")),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, told):
    line = mistake(capsys, *arguments)
    for word in told:
        assert word in line, line


@pytest.mark.parametrize("size", ["0", "-224", "224x0"])
def test_image_sizes_are_positive(capsys, size):
    assert "img_size" in mistake(capsys, f"--img_size={size}")


@pytest.mark.parametrize("triple", ["0,0.5,0.5", "-1,1,1", "nan,0.5,0.5", "inf,1,1"])
def test_pixel_deviations_are_positive(capsys, triple):
    assert "pixel_norm" in mistake(capsys, f"--pixel_norm=0.5,0.5,0.5,{triple}")


@pytest.mark.parametrize(
    "values",
    [
        {"nonsense": 1},
        {"seed": "3"},
        {"seed": True},
        {"restart": 1},
        {"lr_init": "1"},
        {"img_size": 224},
        {"preset": "none"},
        {"modelname": None},
    ],
)
def test_make_config_refuses(values):
    with pytest.raises(UserError):
        make_config(values)


def test_whole_numbers_are_numbers():
    assert Config(alpha=1).alpha == 1


def test_import_starts_nothing(tmp_path):
    """Importing main, and with it every other script, neither parses the command line nor runs anything."""

    def anew() -> None:
        for name in ("main", "train", "extractor", "config"):
            sys.modules.pop(name, None)
        import main  # noqa: F401

    done = forked(anew, ["x", "--nonsense"], tmp_path)
    assert done.returncode == 0 and done.stdout == "" and list(tmp_path.iterdir()) == [], done.stderr


# ---------------------------------------------------------------- one place for one decision
FEATURES = """
    dataset extractor weights_path img_size pixel_norm token_grid mirror precision bands window places
""".split()
FIT = """
    device n_coupling_blocks fc_internal clamp fusion alpha
    identity_start normalize centre_pool batch_size meta_epochs sub_epochs least_steps
    lr_init lr_schedule max_grad_norm feature_noise holdout patience score
""".split()


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Config)])
def test_role_of_every_knob(name):
    """A knob of the wrong role makes a cache or a resumed run that does not fit its settings."""
    expected = "features" if name in FEATURES else "fit" if name in FIT else "run"
    assert [role for role in config.ROLES if name in config.knobs_affecting(role)] == [expected]


def test_help_has_its_sections():
    text = build_parser("").format_help()
    titles = ["most used:", "run:", "data:", "backbone and extraction:", "flow:", "training:", "scoring:"]
    places = [text.index(f"\n{title}\n") for title in titles]
    assert places == sorted(places)


def test_help_starts_with_the_most_used_knobs():
    """Each of them once, before the sections."""
    text = build_parser("").format_help()
    head = text[text.index("most used:") : text.index("\nrun:\n")]
    assert re.findall(r"--(\w+)", head) == list(MOST_USED)
    for name in MOST_USED:
        assert len(re.findall(rf"^  --{name}\b", text, re.MULTILINE)) == 1, name


@pytest.mark.parametrize(
    "got, known, near",
    [
        ("lr_inti", NAMES, "lr_init"),
        ("datasets", NAMES, "dataset"),
        ("sigma", NAMES, None),
        ("epochs", NAMES, "sub_epochs"),
        ("ResNet", config.BACKBONES, None),
        ("zebra", ["cat", "horse"], None),
        ("CIFAR10", config.DATASETS, "cifar10"),
        ("mnist", config.DATASETS, None),
    ],
)
def test_hints_are_for_slips_of_the_pen(got, known, near):
    line = config.unknown("name", got, known)
    assert (f"did you mean {near}" in line) if near else ("did you mean" not in line), line


@pytest.mark.parametrize("spelt, meant", [("CIFAR10", "cifar10"), ("cifar100", "CIFAR100"), ("visa", "VisA")])
def test_names_in_any_case(spelt, meant):
    assert parsed("--dataset", spelt).dataset == meant
    assert parse_values({"dataset": spelt}) == {"dataset": meant}
    assert parsed("--sweep", f"dataset={spelt},digits").sweep


def test_names_are_those_of_the_registries():
    from detector.normalization import NORMALIZATIONS
    from freq_fusion import FUSIONS
    from images import layouts, published

    assert sorted(config.DATASETS) == sorted(["digits", *published.FORMS, *layouts.READERS])
    assert set(config.FUSIONS) == set(FUSIONS)
    assert set(config.NORMALIZATIONS) == {"auto", *NORMALIZATIONS}


@pytest.mark.parametrize("name", config.FORMER)
def test_a_former_knob_says_what_took_its_place(capsys, name):
    """In one line, wherever it comes from: the command line, a script, an old record, a sweep."""
    assert name not in NAMES
    told = f"unknown knob '{name}': {config.FORMER[name]}"
    for take in (make_config, parse_values):
        with pytest.raises(UserError, match=re.escape(told)):
            take({name: "1"})
    with pytest.raises(UserError, match=re.escape(told)):
        parse_sweep(f"fusion=none;{name}=1,2")
    assert config.FORMER[name] in mistake(capsys, f"--{name}", "1")
    assert config.FORMER[name] in mistake(capsys, f"--{name}=1")


def test_what_took_its_place_is_there():
    """The knobs and files that the lines name."""
    for line in config.FORMER.values():
        assert all(name in NAMES for name in re.findall(r"--(\w+)", line)), line
        assert all((ROOT / path).exists() for path in re.findall(r"[\w/]+\.py", line)), line


def test_bad_sweeps_are_refused(capsys):
    for text in ("fusion", "fusion=", "fusoin=none", "fusion=nne", "clamp=x"):
        with pytest.raises(UserError):
            parse_sweep(text)
        mistake(capsys, "--sweep", text)  # before the slow imports


@pytest.mark.parametrize("size", [(), (224,), (224, 224, 3), (224.0, 1.5), (0, 224), ("a", "b")], ids=str)
def test_sizes_of_the_wrong_count_or_kind(size):
    with pytest.raises(UserError, match="img_size: expected a height and a width"):
        Config(img_size=size)


@pytest.mark.parametrize("norm", [(), (0.5, 0.5), (0.5,) * 5, ("a",) * 6, (0.5, 0.5, 0.5, 1, 1, 0)], ids=str)
def test_norms_of_the_wrong_count_or_kind(norm):
    with pytest.raises(UserError, match="pixel_norm: expected three finite numbers and three positive"):
        Config(pixel_norm=norm)
