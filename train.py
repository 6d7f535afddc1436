"""Fit the flow to one normal class and report its detection of all the others, epoch by epoch."""

import config as knobs

if __name__ == "__main__":  # parse before the slow imports: -h and mistakes answer at once
    CONFIG = knobs.from_command_line(__doc__)

import copy
import dataclasses
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

import datasets
import extractor
import model
import utils
from baselines import nearest_neighbours
from config import Config, UserError
from normalization import Normalizer

EVAL_BATCH = 100  # images per forward pass in evaluation: their tokens stay in a CPU's caches
PATCH_SAMPLE = 256  # images whose patch tokens the normaliser's statistics come from
ADAM = {"betas": (0.8, 0.8), "eps": 1e-4}  # the paper's (SPEC 2)


# ---------------------------------------------------------------- features of one class
class TokenSource:
    """Rows of a cached split by index: gathered out of the mapped file, or out of the device's memory where they fit there."""

    def __init__(self, tokens: datasets.Tokens, device: torch.device):
        self.device, self.tokens, self.resident = device, tokens, None
        if device.type == "cuda" and 2 * math.prod(tokens.shape) < 0.5 * torch.cuda.mem_get_info(device)[0]:
            self.resident = torch.empty(tokens.shape, dtype=torch.float16, device=device)
            for rows in torch.arange(len(tokens)).split(1024):
                self.resident[rows] = torch.from_numpy(tokens[rows.numpy()]).to(device)

    def __getitem__(self, index: np.ndarray) -> tuple[Tensor, Tensor]:
        """Semantic (n, C) and patch tokens (n, N, C) of the images ``index``, float32 on the device."""
        if self.resident is not None:
            rows = self.resident[torch.from_numpy(index).to(self.device)]
        else:
            rows = torch.from_numpy(self.tokens[index]).to(self.device)
        rows = rows.float()
        return rows[:, 0], rows[:, 1:]

    def on_cpu(self, index: np.ndarray) -> tuple[Tensor, Tensor]:
        """The same, read from the file to the CPU."""
        rows = torch.from_numpy(self.tokens[index]).float()
        return rows[:, 0], rows[:, 1:]


def parts(index: np.ndarray, size: int) -> list[np.ndarray]:
    """Consecutive pieces of an index array, ``size`` long but the last."""
    return [index[i : i + size] for i in range(0, len(index), size)]


@dataclasses.dataclass(frozen=True)
class ClassData:
    """One one-class problem: where its tokens are and which rows are for what."""

    class_name: str
    train: TokenSource
    test: TokenSource
    fit_rows: np.ndarray  # normal training images that the flow is fitted to
    held_rows: np.ndarray  # normal training images held out for likelihood
    test_rows: np.ndarray
    labels: np.ndarray  # of test_rows: 0 normal, 1 anomalous


def class_data(config: Config, cache: datasets.FeatureCache, class_name: str, seed: int, train: TokenSource, test: TokenSource) -> ClassData:
    """The rows of a class, a share of the normal training images held out at random. Raises UserError when too few remain."""
    train_rows, test_rows, labels = cache.labels.one_class(class_name)
    shuffled = np.random.RandomState(seed).permutation(train_rows)
    n_held = math.ceil(config.holdout * len(shuffled))
    fit_rows, held_rows = np.sort(shuffled[n_held:]), np.sort(shuffled[:n_held])
    if len(fit_rows) < 2 or len(test_rows) == 0:
        raise UserError(f"class {class_name}: {len(fit_rows)} training and {len(test_rows)} test images; expected at least 2 and 1")
    return ClassData(class_name, train, test, fit_rows, held_rows, test_rows, labels)


# ---------------------------------------------------------------- the detector
def normalization(config: Config, features: dict) -> str:
    """The normalisation in effect. auto: the tokens of a transformer pass its final layer norm and are taken as they are, as released; a
    CNN's map (which the paper does not use) is badly scaled for a flow."""
    if config.normalize != "auto":
        return config.normalize
    return "power_l2+whiten" if features["kind"] == "map" else "none"


class Detector(nn.Module):
    """Normaliser and flow: cached tokens -> latent z and log-determinant -> anomaly score."""

    def __init__(self, config: Config, features: dict):
        """features: the sidecar of the cache; n_feat, grid (rows, columns) and kind (map or tokens) are read."""
        super().__init__()
        channels, grid = features["n_feat"], tuple(features["grid"])
        self.score_name = config.score
        compact = config.token_grid == "compact"
        self.normalizer = Normalizer(
            normalization(config, features), channels, config.whiten_ridge, config.centre_pool, grid, config.fusion != "none"
        )
        try:
            self.flow = model.build_flow(
                channels, grid, n_tokens=2 * math.prod(grid) if compact else None, n_blocks=config.n_coupling_blocks,
                hidden=config.fc_internal, clamp=config.clamp, fusion=config.fusion, use_gamma=config.use_gamma,
                identity_start=config.identity_start, heads=config.n_heads, alpha=config.alpha, window=config.window, compact=compact,
            )  # fmt: skip
        except ValueError as error:
            raise UserError(f"{error}; choose another fusion, n_heads or token_grid") from None
        self.register_buffer("reference", torch.zeros(0, channels))  # latents of the training images, for latent_knn

    def forward(self, semantic: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Raw tokens (B, C), (B, N, C) -> z (B, C), log-determinant (B)."""
        semantic, patches = self.normalizer(semantic, patches)
        return self.flow(semantic, [patches])

    @torch.no_grad()
    def latents(self, source: TokenSource, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """z (n, C) and log-determinant (n) of many images."""
        z, log_det = zip(*(self(*source[part]) for part in parts(rows, EVAL_BATCH)))
        return torch.cat(z), torch.cat(log_det)

    def score(self, z: Tensor, log_det: Tensor) -> np.ndarray:
        """The anomaly score that the knob ``score`` names, higher = more anomalous: (n, C), (n) -> (n)."""
        if self.score_name == "latent_knn":
            return nearest_neighbours(self.reference, z).cpu().numpy()
        return (model.latent_score(z) if self.score_name == "latent" else model.likelihood_score(z, log_det)).cpu().numpy()


def make_optimizer(parameters: list[Tensor], config: Config) -> torch.optim.Adam:
    return torch.optim.Adam(parameters, lr=config.lr_init, weight_decay=config.weight_decay, fused=True, **ADAM)


def learning_rate(config: Config, progress: float) -> float:
    """The learning rate after the share ``progress`` (0 to 1) of all steps."""
    return config.lr_init * (0.5 * (1 + math.cos(math.pi * progress)) if config.lr_schedule == "cosine" else 1.0)


class SubnetOptimizers:
    """Adam, one per subnet, that steps during the backward pass, as soon as all gradients of the subnet are there, and drops them.

    The outcome is that of one Adam over all parameters; but the gradients of the whole flow are never held at once, a quarter of what
    training needs. Clipping needs them all: there, ``step`` clips and steps behind the backward pass.
    """

    def __init__(self, flow: nn.Module, config: Config):
        subnets = [list(module.parameters()) for module in flow.modules() if isinstance(module, model.Subnet)]
        self.optimizers = [make_optimizer(parameters, config) for parameters in subnets]
        self.parameters, self.max_norm = [p for parameters in subnets for p in parameters], config.max_grad_norm
        self.missing = [len(parameters) for parameters in subnets]
        if not self.max_norm:
            for number, parameters in enumerate(subnets):
                for parameter in parameters:
                    parameter.register_post_accumulate_grad_hook(lambda _, number=number: self._arrived(number))

    def _arrived(self, number: int) -> None:
        self.missing[number] -= 1
        if self.missing[number] == 0:
            optimizer = self.optimizers[number]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            self.missing[number] = len(optimizer.param_groups[0]["params"])

    def set_learning_rate(self, rate: float) -> None:
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = rate

    def step(self) -> None:
        """What is left to do behind the backward pass."""
        if self.max_norm:
            nn.utils.clip_grad_norm_(self.parameters, self.max_norm)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)


# ---------------------------------------------------------------- one class
@dataclasses.dataclass
class Fitted:
    """What fitting a class left: the detector at the chosen epoch, its scores, and how it came about."""

    detector: Detector
    scores: np.ndarray
    labels: np.ndarray
    test_rows: np.ndarray
    held_scores: np.ndarray  # of the held-out normal training images; empty where none were held out
    history: list[dict]
    result: dict


class Trainer:
    """Fits a detector to one class. ``run`` is the whole course; the other methods are its steps."""

    def __init__(self, config: Config, data: ClassData, features: dict, seed: int, device: torch.device):
        self.config, self.data, self.seed, self.device = config, data, seed, device
        utils.seed_everything(seed)
        self.detector = Detector(config, features)
        self._fit_normalizer()
        self.detector.to(device)
        self.parameters = list(self.detector.parameters())
        self.optimizer = SubnetOptimizers(self.detector.flow, config)
        self.rate = config.lr_init
        self.generator = np.random.RandomState(seed)
        self.noise = torch.Generator(device).manual_seed(seed)
        self.step, self.steps = 0, config.meta_epochs * config.sub_epochs * math.ceil(len(data.fit_rows) / config.batch_size)
        self.history, self.best, self.best_state = [], None, None

    def _fit_normalizer(self) -> None:
        normalizer, rows, source = self.detector.normalizer, self.data.fit_rows, self.data.train
        if normalizer.steps == ["none"]:
            return
        semantic = torch.cat([normalizer.pool(*source.on_cpu(part)).clone() for part in parts(rows, 250)])  # clone: a view would keep the patches
        sample = rows[np.linspace(0, len(rows) - 1, min(PATCH_SAMPLE, len(rows))).astype(int)]
        normalizer.fit(semantic, source.on_cpu(sample)[1].flatten(0, 1))

    def run(self) -> Fitted:
        start = time.perf_counter()
        for meta_epoch in range(1, self.config.meta_epochs + 1):
            losses = [self.train_epoch() for _ in range(self.config.sub_epochs)]
            self.evaluate(meta_epoch * self.config.sub_epochs, losses[-1])
            if self.has_ended():
                break
        return self.finish(time.perf_counter() - start)

    def train_epoch(self) -> float:
        """One pass over the normal training images in a new order -> their mean loss (nats per channel, without the constant)."""
        self.detector.train()
        losses = [self.train_step(batch) for batch in self.progress(self.new_order())]
        return torch.stack(losses).mean().item()

    def new_order(self) -> list[np.ndarray]:
        """The batches of an epoch: rows of the training split, shuffled."""
        return parts(self.generator.permutation(self.data.fit_rows), self.config.batch_size)

    def progress(self, batches):
        return tqdm(batches, desc=self.data.class_name, unit="batch", leave=False, disable=self.config.hide_tqdm_bar)

    @torch.no_grad()
    def inputs(self, batch: np.ndarray) -> tuple[Tensor, Tensor]:
        """What the flow sees of the rows ``batch``: normalised semantic (B, C), with the training noise, and patch tokens (B, N, C)."""
        semantic, patches = self.detector.normalizer(*self.data.train[batch])
        if self.config.feature_noise:
            semantic = semantic + self.config.feature_noise * torch.randn(semantic.shape, generator=self.noise, device=self.device)
        return semantic, patches

    def train_step(self, batch: np.ndarray) -> Tensor:
        """One Adam step on the mean loss of a batch of rows -> the loss, detached."""
        self.optimizer.set_learning_rate(self.next_rate())
        semantic, patches = self.inputs(batch)
        loss = model.loss_per_image(*self.detector.flow(semantic, [patches])).mean()
        loss.backward()
        self.optimizer.step()
        self.after_step(loss.detach())
        return loss.detach()

    def next_rate(self) -> float:
        self.rate = learning_rate(self.config, self.step / self.steps)
        return self.rate

    def after_step(self, loss: Tensor) -> None:
        now = self.device.type == "cpu" or self.step % 64 == 63 or self.step + 1 == self.steps  # on a GPU, reading the loss waits for it
        if now and not self.has_ended():
            self.check_finite(loss)
        self.step += 1

    def has_ended(self) -> bool:
        """Whether the held-out likelihood has not improved for ``patience`` evaluations."""
        if self.config.select_epoch == "last" or self.best is None:
            return False
        return len(self.history) - self.best["index"] >= self.config.patience

    def check_finite(self, value: Tensor) -> None:
        """Raise UserError on a loss that is not finite: the epoch, the learning rate, what to try."""
        if not torch.isfinite(value):
            epochs = self.config.meta_epochs * self.config.sub_epochs
            epoch = min(self.step * epochs // self.steps + 1, epochs)
            raise UserError(
                f"class {self.data.class_name}: the loss is {value.item()} in epoch {epoch} at learning rate "
                f"{self.rate:g}; try a lower lr_init, max_grad_norm 1, or normalize power_l2"
            )

    def evaluate(self, epoch: int, loss: float) -> None:
        """Score the test images and the held-out normals after an epoch; remember the epoch if it is the one to report so far."""
        detector, data = self.detector.eval(), self.data
        entry = {"epoch": epoch, "loss": loss}
        if self.config.score == "latent_knn":
            detector.reference = detector.latents(data.train, data.fit_rows)[0]
        held_scores = np.empty(0)
        if len(data.held_rows):
            held = detector.latents(data.train, data.held_rows)
            entry["held_out_loss"] = model.loss_per_image(*held).mean().item()
            held_scores = detector.score(*held)
        z, log_det = detector.latents(data.test, data.test_rows)
        scores = detector.score(z, log_det)
        if not np.isfinite(scores).all() or not math.isfinite(entry.get("held_out_loss", 0.0)):
            self.step -= 1  # of the epoch that has just ended
            self.check_finite(torch.tensor(float("nan")))
        entry["auroc"] = utils.auroc(data.labels, scores)
        entry["latent_auroc"] = utils.auroc(data.labels, model.latent_score(z).cpu().numpy())
        entry["likelihood_auroc"] = utils.auroc(data.labels, model.likelihood_score(z, log_det).cpu().numpy())
        self.history.append(entry)
        self._choose(entry, scores, held_scores)
        if self.config.verbose:
            held = f"  held-out loss {entry['held_out_loss']:.4f}" if "held_out_loss" in entry else ""
            tqdm.write(f"{data.class_name}  epoch {epoch}  loss {loss:.4f}{held}  AUROC {entry['auroc']:.4f}")

    def _choose(self, entry: dict, scores: np.ndarray, held_scores: np.ndarray) -> None:
        by_likelihood = self.config.select_epoch == "likelihood"
        if not by_likelihood or self.best is None or entry["held_out_loss"] < self.best["entry"]["held_out_loss"]:
            self.best = {"index": len(self.history), "entry": entry, "scores": scores, "held_scores": held_scores}
            self.best_state = copy.deepcopy(self.detector.state_dict()) if by_likelihood and self.config.meta_epochs > 1 else None

    def finish(self, seconds: float) -> Fitted:
        """The detector of the chosen epoch and the result of the class."""
        if self.best_state is not None:
            self.detector.reference = self.best_state["reference"]
            self.detector.load_state_dict(self.best_state)
        data, scores = self.data, self.best["scores"]
        result = {
            "class": data.class_name, "seed": self.seed, **utils.detection_metrics(data.labels, scores),
            "best_on_test_auroc": max(entry["auroc"] for entry in self.history), "epoch": self.best["entry"]["epoch"],
            "latent_auroc": self.best["entry"]["latent_auroc"], "likelihood_auroc": self.best["entry"]["likelihood_auroc"],
            "loss": self.best["entry"]["loss"], "held_out_loss": self.best["entry"].get("held_out_loss"),
            "n_train": len(data.fit_rows), "n_held_out": len(data.held_rows), "n_test": len(data.test_rows), "seconds": round(seconds, 1),
        }  # fmt: skip
        return Fitted(self.detector, scores, data.labels, data.test_rows, self.best["held_scores"], self.history, result)


# ---------------------------------------------------------------- checkpoints
def run_folder(config: Config) -> Path:
    return Path("runs") / config.modelname


def checkpoint_path(config: Config, class_name: str, seed: int) -> Path:
    """Where a class and seed of a run is kept, without the suffix."""
    return run_folder(config) / "classes" / f"{class_name.replace('/', '_')}-seed{seed}"


def save_fitted(config: Config, cache: datasets.FeatureCache, fitted: Fitted) -> Path:
    """Keep a fitted class: its result with configuration, history and scores (JSON, written last), and its weights (safetensors)."""
    path = checkpoint_path(config, fitted.result["class"], fitted.result["seed"])
    path.with_suffix(".json").unlink(missing_ok=True)  # an older run's: it would not fit what is written now
    path.with_suffix(".safetensors").unlink(missing_ok=True)
    if config.save_model:
        with utils.whole_file(path.with_suffix(".safetensors")) as partial:
            save_file({name: tensor.contiguous().cpu() for name, tensor in fitted.detector.state_dict().items()}, partial)
    content = {
        "result": fitted.result, "history": fitted.history, "config": dataclasses.asdict(config), "features": cache.meta,
        "test": {"rows": fitted.test_rows.tolist(), "labels": fitted.labels.tolist(), "scores": fitted.scores.astype(float).tolist()},
        "held_out_scores": fitted.held_scores.astype(float).tolist(),
    }  # fmt: skip
    utils.write_json(path.with_suffix(".json"), content)
    return path


def undefined_as_nan(entry: dict) -> dict:
    """Metrics that were undefined (one label only) stand as null in JSON; here as NaN again."""
    return {name: float("nan") if value is None and name.endswith(("auroc", "aupr", "fpr95")) else value for name, value in entry.items()}


def config_of(content: dict) -> Config:
    """The configuration that a class's JSON was made with."""
    return Config(**{name: tuple(value) if isinstance(value, list) else value for name, value in content["config"].items()})


def load_detector(path: Path) -> tuple[Detector, dict]:
    """The detector of a checkpoint (either of its two files) and what its JSON says. Unpickles nothing. Raises UserError."""
    path = Path(path)
    try:
        content = json.loads(path.with_suffix(".json").read_text())
        state = load_file(path.with_suffix(".safetensors"))
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"expected a checkpoint {path.with_suffix('.json')} with its .safetensors beside it ({error})") from None
    detector = Detector(config_of(content), content["features"])
    detector.reference = state["reference"]
    detector.load_state_dict(state)
    return detector.eval(), content


# ---------------------------------------------------------------- the script
def make_trainer(config: Config, cache: datasets.FeatureCache, class_name: str, seed: int, train: TokenSource, test: TokenSource) -> Trainer:
    """The trainer of one class and seed. What it comes to does not depend on what ran before."""
    data = class_data(config, cache, class_name, seed, train, test)
    return Trainer(config, data, cache.meta, seed, train.device)


def main(config: Config) -> None:
    device = utils.set_up(config.device, config.threads)
    if config.class_name == "all" or "," in config.class_name:
        raise UserError(f"train.py fits one class: give it with --class_name (now {config.class_name!r}); main.py fits several")
    cache = extractor.ensure_features(config, device)
    class_name = datasets.choose_classes(cache.labels, config.class_name)[0]
    train, test = TokenSource(cache.tokens("train"), device), TokenSource(cache.tokens("test"), device)
    fitted = make_trainer(config, cache, class_name, config.seed, train, test).run()
    path = save_fitted(config, cache, fitted)
    result = fitted.result
    print(
        f"{class_name}: AUROC {result['auroc']:.4f}  AUPR {result['aupr']:.4f}  FPR at 95 % TPR {result['fpr95']:.4f}  (epoch {result['epoch']}, "
        f"best on test {result['best_on_test_auroc']:.4f})  {result['seconds']:.0f} s  kept in {path}.json"
    )


if __name__ == "__main__":
    knobs.run_script(main, CONFIG)
