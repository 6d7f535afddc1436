"""The folder of a run: who writes it, which of its classes and seeds are finished, which rank takes which.

A pair is one class with one seed. It is finished when its record and weights are whole and were made with
this very configuration on these very features. Ranks (several processes, on one machine or many with a
shared folder) claim pairs by lock files, and never talk: a rank that dies gives its claims back, and any
rank, or the next run, takes them. Layout of runs/<modelname>/: ``run.json`` what the run is,
``.writer-<rank>-of-<n>`` who writes it, ``classes/`` the pairs."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import utils
from cache import feature_cache
from config import OWN_PICTURES, Config, UserError, knobs_affecting
from detector import checkpoints
from shell.command_line import to_go_on
from shell.files import as_strict_json, read_sealed, write_sealed
from shell.locks import Lock

FAILED = ".failed.json"  # the ending of what a pair leaves that cannot be fitted


class ClassSeed(NamedTuple):
    class_name: str
    seed: int


# ---------------------------------------------------------------- one modelname, one writer
@contextlib.contextmanager
def writing(config: Config) -> Iterator[None]:
    """Hold the run's folder as its only writer, or as one of the ranks that share it. Raises UserError when
    it cannot be written, or another run is at it; what was made for nothing is taken away again."""
    folder, ranks = checkpoints.run_folder(config), utils.ranks(config)
    if config.restart and ranks.world_size > 1:
        raise UserError(
            "restart: one process at a time; drop the old run with one, or give another --modelname"
        )
    lock = Lock(folder / f".writer-{ranks.rank}-of-{ranks.world_size}")
    try:
        try:
            _take(lock, folder)
            (folder / "classes").mkdir(exist_ok=True)
            if ranks.world_size == 1:
                _sweep_up(folder)
        except OSError as error:
            raise UserError(
                f"{folder} cannot be written ({error.strerror}); start in another folder"
            ) from None
        yield
    finally:
        lock.release()
        for made in (folder / "classes", folder, *folder.parents[:-1]):
            with contextlib.suppress(OSError):
                made.rmdir()  # where nothing was written into it


def _take(lock: Lock, folder: Path) -> None:
    for _ in range(10):  # another rank may be looking whether this lock is held
        if lock.take():
            break
        time.sleep(0.1)
    else:
        raise UserError(_busy(folder, lock))
    world = lock.path.name.rpartition("-")[2]
    for path in folder.glob(".writer-*"):
        other = Lock(path)
        if path.name.rpartition("-")[2] != world and not other.take():
            raise UserError(_busy(folder, other))
        other.release()


def _busy(folder: Path, lock: Lock) -> str:
    return f"{folder} is being written by {lock.owner()}; wait for its end, or give another --modelname"


def _sweep_up(folder: Path) -> None:
    """Remove what killed runs left half-written."""
    for place in (folder, folder / "classes", folder / "figures"):
        for path in place.glob(".*.partial"):
            path.unlink(missing_ok=True)


# ---------------------------------------------------------------- one modelname, one configuration
def identity(config: Config, cache: feature_cache.FeatureCache) -> dict:
    """What the outcome of a pair depends on, besides class and seed, as JSON has it."""
    parts = {"config": fitted_by(config), "features": cache.meta, "scoring": checkpoints.SCORING}
    return as_strict_json(parts)


def fitted_by(config: Config) -> dict:
    """The knobs that a fit depends on; of one's own pictures, the false-alarm rate is one of them: it says
    how many pictures are held out."""
    held_out_for = ("false_alarms",) if config.dataset in OWN_PICTURES else ()
    return {name: getattr(config, name) for name in (*knobs_affecting("features", "fit"), *held_out_for)}


def settle(config: Config, cache: feature_cache.FeatureCache, pairs: list[ClassSeed]) -> None:
    """Make the folder this configuration's, or find that it is; with ``restart``, without what it holds of
    the pairs. Raises UserError, with the knobs that differ, when it holds the classes of another
    configuration: they are neither mixed nor overwritten, but dropped by ``restart``, all of them."""
    folder = checkpoints.run_folder(config)
    path, wanted = folder / "run.json", identity(config, cache)
    advice = "give another --modelname, or drop what is there with --restart"
    if config.restart:
        try:
            same = not differences(read_sealed(path), wanted)
        except (OSError, ValueError):
            same = False
        drop(config, pairs if same else None)
        write_sealed(path, wanted)
        return
    alone = utils.ranks(config).world_size == 1
    kept = [path for path in (folder / "classes").glob("*-seed*.json") if not path.name.endswith(FAILED)]
    try:
        found = read_sealed(path)
    except FileNotFoundError:
        if kept:
            raise UserError(
                f"{folder} holds classes of an earlier version of this program; {advice}"
            ) from None
        write_sealed(path, wanted)
        return
    except ValueError as error:
        raise UserError(f"{error}; {advice}") from None
    differing = differences(found, wanted)
    if differing and not kept and alone:  # nothing to lose
        write_sealed(path, wanted)
    elif differing:
        raise UserError(f"{folder} holds classes of another configuration: {differing}; {advice}")


def differences(found: dict, wanted: dict) -> str:
    """In one line, the knobs and the fields of the features that differ; empty where none does."""
    told = []
    for part in ("config", "features"):
        old, new = found.get(part) or {}, wanted[part]
        for name in dict.fromkeys((*new, *old)):
            if old.get(name) != new.get(name) and name not in told:
                told.append(name)
                told[-1:] = [f"{name} {_short(old.get(name))} there, {_short(new.get(name))} now"]
    if found.get("scoring") != wanted["scoring"]:
        told.append("scores are made by other formulas there")
    return ", ".join(dict.fromkeys(told))


def _short(value) -> str:
    return text if len(text := str(value)) < 40 else f"{text[:36]}..."


def drop(config: Config, pairs: list[ClassSeed] | None = None) -> None:
    """Remove what earlier runs of this name left, of some pairs or (None) of all, the identity, too: files of
    this program's own making, by name and mark."""
    folder = checkpoints.run_folder(config)
    names = ["results.json", "results.csv", "results.md", "report.html"]
    if pairs is None:
        paths = [*(folder / "classes").glob("*-seed*.json")]
        names.append("run.json")
    else:
        records = [checkpoints.checkpoint_files(checkpoints.checkpoint_path(config, *p))[0] for p in pairs]
        paths = records + [failure_path(config, pair) for pair in pairs]
    for path in paths:
        with contextlib.suppress(FileNotFoundError, ValueError):
            read_sealed(path)  # anything else is left alone
            for file in (path, path.with_name(f"{path.name.removesuffix('.json')}.safetensors")):
                file.unlink(missing_ok=True)
    for name in names:
        (folder / name).unlink(missing_ok=True)


# ---------------------------------------------------------------- finished or failed
def finished(config: Config, cache: feature_cache.FeatureCache, pair: ClassSeed) -> dict | None:
    """The result of a pair that was finished under this configuration and these features; None when it was
    not, or its files are not whole, or lack what is asked for now."""
    path = checkpoints.checkpoint_path(config, *pair)
    try:
        record = checkpoints.read_record(path)
        fitted_with = checkpoints.config_of(record)
    except (OSError, ValueError, UserError):
        return None
    kept = {"config": fitted_by(fitted_with)} | {part: record.get(part) for part in ("features", "scoring")}
    if as_strict_json(kept) != identity(config, cache):
        return None
    if (record["result"].get("class"), record["result"].get("seed")) != pair:
        return None
    if config.keep != "results" and checkpoints.weights_fault(record, checkpoints.checkpoint_files(path)[1]):
        return None
    compared = config.baselines and pair[1] == config.seed
    if compared and not record["simple_scores"] and len(record["test"]["labels"]):
        return None
    return record["result"]


def failure_path(config: Config, pair: ClassSeed) -> Path:
    path = checkpoints.checkpoint_path(config, *pair)
    return path.with_name(path.name + FAILED)


def failed(config: Config, cache: feature_cache.FeatureCache, pair: ClassSeed) -> dict | None:
    """The result of a pair that failed under this configuration and these features: its reason."""
    try:
        record = read_sealed(failure_path(config, pair))
    except (OSError, ValueError):
        return None
    wanted = identity(config, cache)
    same = {part: record.get(part) for part in wanted} == wanted
    return checkpoints.undefined_as_nan(record["result"]) if same else None


def keep_failure(config: Config, cache: feature_cache.FeatureCache, pair: ClassSeed, result: dict) -> None:
    """Keep why a pair failed, for the other ranks and the report; its checkpoint, if any, is gone."""
    for path in checkpoints.checkpoint_files(checkpoints.checkpoint_path(config, *pair)):
        path.unlink(missing_ok=True)
    write_sealed(failure_path(config, pair), identity(config, cache) | {"result": result})


# ---------------------------------------------------------------- how long it took
class Stopwatch:
    """Hands out the time since it was last asked, at first since ``since`` (time.perf_counter(), which all
    processes of a machine share)."""

    def __init__(self, since: float | None = None) -> None:
        self.since = time.perf_counter() if since is None else since

    def lap(self) -> float:
        now, since = time.perf_counter(), self.since
        self.since = now
        return round(now - since, 3)

    def share(self) -> dict:
        """The same as a result keeps it: its share of the wall time, and when that ended (s since 1970)."""
        return {"wall_time_s": self.lap(), "ended": round(time.time(), 3)}


def wall_time(results: list[dict]) -> float:
    """The seconds in which at least one of the results was worked at: those of ranks that work at the same
    time count once, where it is known when they ended."""
    total, until = sum(result["wall_time_s"] for result in results if "ended" not in result), 0.0
    timed = [result for result in results if "ended" in result]
    for result in sorted(timed, key=lambda result: result["ended"] - result["wall_time_s"]):
        start = max(result["ended"] - result["wall_time_s"], until)
        total += max(0.0, result["ended"] - start)
        until = max(until, result["ended"])
    return total


# ---------------------------------------------------------------- whose turn it is
class Progress:
    """The pairs of a run: which are done, and claims on the others."""

    def __init__(self, config: Config, cache: feature_cache.FeatureCache, pairs: list[ClassSeed]):
        self.config, self.cache, self.pairs = config, cache, pairs
        self.ranks = utils.ranks(config)
        self.results: dict[ClassSeed, dict] = {}
        self.claims: dict[ClassSeed, Lock] = {}
        for path in () if self.ranks.world_size > 1 else (failure_path(config, pair) for pair in pairs):
            path.unlink(missing_ok=True)  # a new run tries again
        self.look()

    def look(self) -> list[ClassSeed]:
        """See what is done, by whomever -> the pairs that were not, as far as this rank knew."""
        new = []
        for pair in self.pairs:
            if pair in self.results:
                continue
            result = finished(self.config, self.cache, pair) or failed(self.config, self.cache, pair)
            if result:
                self.results[pair] = result
                new.append(pair)
        return new

    def missing(self) -> list[ClassSeed]:
        return [pair for pair in self.pairs if pair not in self.results]

    def claim(self, pair: ClassSeed) -> bool:
        """Whether the pair is this process's to fit now: neither done nor another process's."""
        path = checkpoints.checkpoint_path(self.config, *pair)
        lock = Lock(path.with_name(f".{path.name}.claim"))
        if pair in self.results or not lock.take():
            return False
        self.claims[pair] = lock
        self.look()  # another may have finished it just before it was claimed
        if pair in self.results:
            self.release(pair)
        return pair not in self.results

    def release(self, pair: ClassSeed) -> None:
        if pair in self.claims:
            self.claims.pop(pair).release()

    def keep(self, pair: ClassSeed, result: dict) -> None:
        self.results[pair] = result
        self.release(pair)

    def turns(self) -> Iterator[ClassSeed]:
        """The pairs that this process is to fit, claimed, until none is left to claim. Rank 0 waits for those
        that others are at."""
        try:
            while self.missing():
                for pair in self.ranks.own_first(self.pairs):
                    if self.claim(pair):
                        yield pair
                if self.missing() and self.ranks.rank:
                    return
                if self.missing():
                    time.sleep(0.5)
                    self.look()
        finally:
            for pair in list(self.claims):
                self.release(pair)

    def report_is_mine(self) -> bool:
        """Whether all pairs are done and the report is this rank's to write: rank 0's, or that of any rank
        that sees all done while there is no rank 0."""
        if self.missing():
            return False
        first = Lock(checkpoints.run_folder(self.config) / f".writer-0-of-{self.ranks.world_size}")
        if self.ranks.rank == 0:
            return True
        alone = first.take()
        first.release()
        return alone

    def tidy(self) -> None:
        """Once all is done: remove the locks and half-written files of ranks that were killed."""
        folder = checkpoints.run_folder(self.config)
        for path in (*folder.glob(".writer-*"), *(folder / "classes").glob(".*.claim")):
            lock = Lock(path)  # one that is held stays
            lock.take()
            lock.release()
        _sweep_up(folder)

    def go_on(self) -> str:
        """What an interrupted run has kept, and the command that goes on with it."""
        self.look()
        done = len(self.pairs) - len(self.missing())
        return f"{done} of {len(self.pairs)} classes are kept; go on with: {to_go_on()}"
