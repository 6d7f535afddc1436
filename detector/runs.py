"""The folder of a run: who writes it, and which of its classes and seeds are finished.

A pair is one class with one seed. It is finished when its record and weights are whole and were made with
this very configuration on these very features. Layout of runs/<modelname>/: ``run.json`` what the run is,
``.writer`` which script writes it, ``classes/`` the pairs."""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from cache.feature_cache import FeatureCache
from config import OWN_PICTURES, Config, UserError, knobs_affecting
from detector.checkpoints import SCORING, checkpoint_files, checkpoint_path, read_record, run_folder
from shell.files import as_strict_json, read_sealed, sweep, write_sealed


class ClassSeed(NamedTuple):
    class_name: str
    seed: int


# ---------------------------------------------------------------- one modelname, one writer
@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Hold the run's folder as the only script that writes it, with its tasks. Raises UserError when it
    cannot be written, or another run is at it; what was made for nothing is taken away again."""
    path = folder / ".writer"
    lock = FileLock(path)
    try:
        try:
            (folder / "classes").mkdir(parents=True, exist_ok=True)
            lock.acquire(blocking=False)
            path.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        except Timeout:
            who = path.read_text() or "another process"
            advice = "wait for its end, or give another --modelname"
            raise UserError(f"{folder} is being written by {who}; {advice}") from None
        except OSError as error:
            told = f"{folder} cannot be written ({error.strerror}); start in another folder"
            raise UserError(told) from None
        yield
    finally:
        if lock.is_locked:
            path.unlink()
            lock.release()
        for made in (folder / "classes", folder, *folder.parents[:-1]):
            with contextlib.suppress(OSError):
                made.rmdir()  # where nothing was written into it


def sweep_up(folder: Path) -> None:
    """Remove what killed processes left half-written in the run's folder."""
    for place in (folder, folder / "classes", folder / "figures"):
        sweep(place)


# ---------------------------------------------------------------- one modelname, one configuration
def settle(config: Config, cache: FeatureCache, pairs: list[ClassSeed]) -> dict[ClassSeed, dict]:
    """Make the folder this configuration's, with ``restart`` without what it holds of the pairs -> the
    results of those that are finished. Raises UserError, with the knobs that differ, when it holds the
    classes of another configuration: they are neither mixed nor overwritten, but dropped by ``restart``, all
    of them."""
    folder = run_folder(config.modelname)
    sweep_up(folder)
    made_by = identity(config, cache)
    try:
        there = read_sealed(folder / "run.json")
        differing = differences(there, made_by)
    except (OSError, ValueError):
        differing = "an earlier version of this program made them"
    if config.restart:
        drop(folder, None if differing else pairs)
    elif differing and any((folder / "classes").glob("*-seed*.json")):
        raise UserError(
            f"{folder} holds classes of another configuration: {differing}; give another --modelname, or "
            "drop what is there with --restart"
        )
    write_sealed(folder / "run.json", made_by)
    return {pair: result for pair in pairs if (result := finished(config, made_by, folder, pair))}


def identity(config: Config, cache: FeatureCache) -> dict:
    """What the outcome of a pair depends on, besides class and seed, as JSON has it. Of one's own pictures,
    the false-alarm rate is one of the knobs: it says how many pictures are held out."""
    held_out_for = ("false_alarms",) if config.dataset in OWN_PICTURES else ()
    knobs = {name: getattr(config, name) for name in (*knobs_affecting("features", "fit"), *held_out_for)}
    return as_strict_json({"config": knobs, "features": cache.meta, "scoring": SCORING})


def differences(there: dict, wanted: dict) -> str:
    """In one line, the knobs and the fields of the features in which two identities differ; "" for none."""
    told = {}
    for part in ("config", "features"):
        old, new = there.get(part, {}), wanted[part]
        for name in dict.fromkeys((*new, *old)):
            if old.get(name) != new.get(name):
                told[name] = f"{name} {str(old.get(name)):.40} there, {str(new.get(name)):.40} now"
    if there.get("scoring") != wanted["scoring"]:
        told["scoring"] = "scores are made by other formulas there"
    return ", ".join(told.values())


def drop(folder: Path, pairs: list[ClassSeed] | None) -> None:
    """Remove what earlier runs left in the folder, of some pairs or (None) of all."""
    paths = [folder / name for name in ("results.json", "results.csv", "results.md", "report.html")]
    if pairs is None:
        paths += (folder / "classes").glob("*-seed*")
    for pair in pairs or ():
        paths += checkpoint_files(checkpoint_path(folder, *pair))
    for path in paths:
        path.unlink(missing_ok=True)


def finished(config: Config, made_by: dict, folder: Path, pair: ClassSeed) -> dict | None:
    """The result of a pair that was finished under this ``identity``; None when it was not, or
    its files are not whole, or lack what is asked for now."""
    try:
        record = read_record(checkpoint_path(folder, *pair), whole=config.keep != "results")
    except (OSError, ValueError):
        return None
    result, knobs = record.result, {name: record.config.get(name) for name in made_by["config"]}
    found = {"config": knobs, "features": record.features, "scoring": record.scoring}
    if found != made_by or ClassSeed(result["class"], result["seed"]) != pair:
        return None
    compared = config.baselines and pair.seed == config.seed and result["n_test"]
    return None if compared and not record.simple_scores else result
