"""The folder of a run: who writes it, and which of its classes and seeds are finished.

A pair is one class with one seed. It is finished when its record and weights are whole and were made with
this very configuration on these very features. Layout of runs/<modelname>/: ``run.json`` what the run is,
``.writer`` which script writes it, ``classes/`` the pairs."""

import contextlib
import os
import socket
from collections.abc import Iterator
from typing import NamedTuple

from filelock import FileLock, Timeout

from cache.feature_cache import FeatureCache
from config import OWN_PICTURES, Config, UserError, knobs_affecting
from detector import checkpoints
from shell.files import as_strict_json, read_sealed, sweep, write_sealed


class ClassSeed(NamedTuple):
    class_name: str
    seed: int


# ---------------------------------------------------------------- one modelname, one writer
@contextlib.contextmanager
def writing(config: Config) -> Iterator[None]:
    """Hold the run's folder as the only script that writes it, with its tasks. Raises UserError when it
    cannot be written, or another run is at it; what was made for nothing is taken away again."""
    folder = checkpoints.run_folder(config)
    path = folder / ".writer"
    lock = FileLock(path)
    try:
        try:
            (folder / "classes").mkdir(parents=True, exist_ok=True)
            lock.acquire(blocking=False)
            path.write_text(f"process {os.getpid()} on {socket.gethostname()}")
            sweep_up(config)
        except Timeout:
            who = path.read_text() or "another process"
            advice = "wait for its end, or give another --modelname"
            raise UserError(f"{folder} is being written by {who}; {advice}") from None
        except OSError as error:
            raise UserError(
                f"{folder} cannot be written ({error.strerror}); start in another folder"
            ) from None
        yield
    finally:
        if lock.is_locked:
            path.unlink()
            lock.release()
        for made in (folder / "classes", folder, *folder.parents[:-1]):
            with contextlib.suppress(OSError):
                made.rmdir()  # where nothing was written into it


def sweep_up(config: Config) -> None:
    """Remove what killed processes left half-written."""
    folder = checkpoints.run_folder(config)
    for place in (folder, folder / "classes", folder / "figures"):
        sweep(place)


# ---------------------------------------------------------------- one modelname, one configuration
def settle(config: Config, cache: FeatureCache, pairs: list[ClassSeed]) -> dict[ClassSeed, dict]:
    """Make the folder this configuration's, with ``restart`` without what it holds of the pairs -> the
    results of those that are finished. Raises UserError, with the knobs that differ, when it holds the
    classes of another configuration: they are neither mixed nor overwritten, but dropped by ``restart``, all
    of them."""
    folder, made_by = checkpoints.run_folder(config), identity(config, cache)
    try:
        there = read_sealed(folder / "run.json")
        differing = differences(there, made_by)
    except (OSError, ValueError):
        differing = "an earlier version of this program made them"
    if config.restart:
        drop(config, None if differing else pairs)
    elif differing and any((folder / "classes").glob("*-seed*.json")):
        raise UserError(
            f"{folder} holds classes of another configuration: {differing}; give another --modelname, or "
            "drop what is there with --restart"
        )
    write_sealed(folder / "run.json", made_by)
    return {pair: result for pair in pairs if (result := finished(config, made_by, pair))}


def identity(config: Config, cache: FeatureCache) -> dict:
    """What the outcome of a pair depends on, besides class and seed, as JSON has it. Of one's own pictures,
    the false-alarm rate is one of the knobs: it says how many pictures are held out."""
    held_out_for = ("false_alarms",) if config.dataset in OWN_PICTURES else ()
    knobs = {name: getattr(config, name) for name in (*knobs_affecting("features", "fit"), *held_out_for)}
    return as_strict_json({"config": knobs, "features": cache.meta, "scoring": checkpoints.SCORING})


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


def drop(config: Config, pairs: list[ClassSeed] | None = None) -> None:
    """Remove what earlier runs of this name left, of some pairs or (None) of all, the identity, too."""
    folder = checkpoints.run_folder(config)
    paths = [folder / name for name in ("results.json", "results.csv", "results.md", "report.html")]
    if pairs is None:
        paths += [folder / "run.json", *(folder / "classes").glob("*-seed*")]
    else:
        for pair in pairs:
            paths += checkpoints.checkpoint_files(checkpoints.checkpoint_path(config, *pair))
    for path in paths:
        path.unlink(missing_ok=True)


def finished(config: Config, made_by: dict, pair: ClassSeed) -> dict | None:
    """The result of a pair that was finished under this ``identity``; None when it was not, or
    its files are not whole, or lack what is asked for now."""
    path = checkpoints.checkpoint_path(config, *pair)
    try:
        record = checkpoints.read_record(path)
    except (OSError, ValueError):
        return None
    result, knobs = record.result, {name: record.config.get(name) for name in made_by["config"]}
    found = {"config": knobs, "features": record.features, "scoring": record.scoring}
    if found != made_by or ClassSeed(result["class"], result["seed"]) != pair:
        return None
    if config.keep != "results" and checkpoints.weights_fault(record, checkpoints.checkpoint_files(path)[1]):
        return None
    compared = config.baselines and pair.seed == config.seed and result["n_test"]
    return None if compared and not record.simple_scores else result
