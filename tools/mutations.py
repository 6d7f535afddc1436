"""Break one line at a time in a copy of the repository and see whether a test dies. Run by hand, not in CI.

python tools/mutations.py             all of them, one by one: a Markdown table, and the survivors at the end
python tools/mutations.py resume      those whose name holds this word
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Mutation(NamedTuple):
    name: str
    file: str
    old: str  # must occur in the file
    new: str
    tests: str  # the test files that should notice, separated by spaces


MUTATIONS = [
    Mutation(
        "centre pooling gives the backbone's token",
        "normalization.py",
        "return semantic if self.window is None",
        "return semantic if True",
        "bands",
    ),
    Mutation(
        "validate does nothing",
        "datasets.py",
        "return validation_set(found) if config.validate else found",
        "return found",
        "extractor",
    ),
    Mutation(
        "auto does not normalise maps",
        "detector.py",
        '"power_l2+whiten" if features["kind"] == "map"',
        '"none" if features["kind"] == "map"',
        "train",
    ),
    Mutation(
        "a run of other features goes on",
        "runs.py",
        'for part in ("config", "features"):\n        old',
        'for part in ("config",):\n        old',
        "runs",
    ),
    Mutation(
        "a long call keeps a script alive",
        "config.py",
        "    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)  # told",
        "    pass  # told",
        "reliability",
    ),
    Mutation(
        "a folder's name may be no text",
        "datasets.py",
        "        if any(0xD800 <= ord(c) < 0xE000 for c in name):",
        "        if False:",
        "names",
    ),
    Mutation(
        "what the baselines need is not asked for",
        "runs.py",
        '    if compared and not record["own_input_scores"]',
        '    if False and not record["own_input_scores"]',
        "runs",
    ),
    Mutation(
        "restart keeps what is there",
        "runs.py",
        "        drop(config)\n",
        "",
        "runs",
    ),
    Mutation(
        "a rank's failure is tried by every rank",
        "runs.py",
        "or failed(self.config, self.cache, cell)",
        "",
        "reliability",
    ),
    Mutation(
        "cut weights pass for finished",
        "runs.py",
        "if config.save_model and detector.weights_fault(",
        "if False and detector.weights_fault(",
        "runs",
    ),
    Mutation(
        "an edited record passes",
        "utils.py",
        'if content["checksum"] != checksum(content):',
        "if False:",
        "checkpoint runs",
    ),
    Mutation(
        "weights that are not finite are loaded",
        "detector.py",
        '    if broken:\n        raise UserError(f"{weights} holds',
        '    if False:\n        raise UserError(f"{weights} holds',
        "checkpoint",
    ),
    Mutation(
        "a score that is not finite is a verdict",
        "detector.py",
        "        if len(broken):",
        "        if False:",
        "checkpoint",
    ),
    Mutation(
        "two writers at once",
        "runs.py",
        "            raise UserError(_busy(folder, other))",
        "            pass",
        "runs",
    ),
    Mutation(
        "a bad class stops the others",
        "main.py",
        "        except ClassError as mistake:",
        "        except ZeroDivisionError as mistake:",
        "runs",
    ),
    Mutation(
        "constant features are fitted",
        "detector.py",
        "    if (sample == sample[0]).all():",
        "    if False:",
        "runs",
    ),
    Mutation(
        "damaged features are blamed on the learning rate",
        "train.py",
        "if fault := detector.features_fault(self.data):",
        "if fault := None:",
        "runs",
    ),
    Mutation(
        "ranks do not claim",
        "runs.py",
        "if cell not in self.results and lock.take():",
        "if cell not in self.results:",
        "reliability",
    ),
    Mutation(
        "surplus weights are ignored",
        "backbones.py",
        '(surplus, "there that it has not")',
        '((), "")',
        "extractor",
    ),
    Mutation(
        "memory is not asked about",
        "utils.py",
        "    if needed > free:",
        "    if False:",
        "memory",
    ),
    Mutation(
        "two classes share a checkpoint",
        "utils.py",
        '    return short if short == name else f"{short}~',
        '    return short if True else f"{short}~',
        "names",
    ),
    Mutation(
        "a run's name leads anywhere",
        "config.py",
        '            check_folder_name("modelname", part)',
        "            pass",
        "names",
    ),
    Mutation(
        "fusion is a run knob",
        "config.py",
        'choices=FUSIONS, affects="fit"',
        'choices=FUSIONS, affects="run"',
        "config",
    ),
    Mutation(
        "pooling dropped from the identity",
        "token_grid.py",
        '"pooling": self.pooling if self.side else "correct"',
        '"pooling": "correct"',
        "extractor",
    ),
    Mutation(
        "window dropped from the identity",
        "token_grid.py",
        '"window": self.window if self.bands else None',
        '"window": None',
        "extractor",
    ),
    Mutation(
        "weights_sha256 not recorded",
        "extractor.py",
        "utils.sha256_of_tensors(backbone.state_dict())",
        '""',
        "extractor",
    ),
    Mutation(
        "rings dropped from the identity", "extractor.py", "if not config.bands:", "if True:", "extractor"
    ),
    Mutation("deviation over seeds with ddof 0", "report.py", "ddof=1", "ddof=0", "report"),
    Mutation(
        "sweep table repeats its first column",
        "report.py",
        "summaries[(value, *column)]",
        "summaries[(value, *columns[0])]",
        "report",
    ),
    Mutation(
        "sweep headings swapped",
        "report.py",
        "SCORE_AUROCS.items():\n",
        "zip(SCORE_AUROCS, reversed(SCORE_AUROCS.values())):\n",
        "report",
    ),
    Mutation(
        "CSV without quotes",
        "report.py",
        "csv.writer(text, ",
        "csv.writer(text, quoting=3, escapechar='|', ",
        "report",
    ),
    Mutation("histogram labels swapped", "figures.py", '(0, "normal"', '(1, "normal"', "figures"),
    Mutation(
        "contact sheet unsorted",
        "figures.py",
        'own[np.argsort(scores[own], kind="stable")]',
        "own",
        "figures",
    ),
    Mutation(
        "texture defects never drawn",
        "tools/textures.py",
        "return image + opacity[..., None] *",
        "return image + 0 * opacity[..., None] *",
        "textures",
    ),
    Mutation(
        "pooling a full cache without a disk check",
        "extractor.py",
        "    check_disk(identity.folder, images.labels, shapes)\n    fields = source",
        "    fields = source",
        "extractor",
    ),
    Mutation(
        "patch statistics from two images", "train.py", "PATCH_SAMPLE = 256", "PATCH_SAMPLE = 2", "train"
    ),
    Mutation("help sections lost", "config.py", "if name in SECTIONS:", "if False:", "config"),
    Mutation("stale weights kept", "detector.py", "    weights.unlink(missing_ok=True)\n", "", "checkpoint"),
    Mutation(
        "texture weight upside down",
        "detector.py",
        "surface = 1 / (1 + (alike / self.spread_at_balance) ** 4)",
        "surface = 1 - 1 / (1 + (alike / self.spread_at_balance) ** 4)",
        "bands",
    ),
    Mutation("any images count as grown", "growth.py", "if not before < now or", "if False or", "growth"),
    Mutation(
        "known features are extracted again",
        "growth.py",
        "lambda i: keys[i] in self.rows",
        "lambda i: False",
        "growth",
    ),
    Mutation(
        "growth without room",
        "growth.py",
        "manifest.size(cache.manifest.shards) > MOST",
        "manifest.size([]) > MOST",
        "growth",
    ),
    Mutation(
        "localisation left off the page",
        "webpage.py",
        'section("Where the defect is", localisation(summary))',
        'section("Where the defect is", "")',
        "webpage",
    ),
    Mutation(
        "pictures on their side",
        "extractor.py",
        "sides = (math.sqrt(area * ratio), math.sqrt(area / ratio))",
        "sides = (math.sqrt(area / ratio), math.sqrt(area * ratio))",
        "shape",
    ),
    Mutation("pictures are enlarged", "extractor.py", "min(pixels, area)", "pixels", "shape"),
    Mutation(
        "a grown folder has another size",
        "extractor.py",
        "tuple(size) if size else size_for",
        "size_for",
        "shape",
    ),
    Mutation(
        "a turned photograph is measured lying",
        "images.py",
        "(width, height) if exif.get(ORIENTATION, 1) in SIDEWAYS else (height, width)",
        "(height, width)",
        "shape",
    ),
    Mutation(
        "weights of another size are taken",
        "backbones.py",
        '"pos" in name or weights.shape',
        "True or weights.shape",
        "shape",
    ),
    Mutation(
        "places of large images are large",
        "token_grid.py",
        "min(math.prod(img_size), math.prod(own_size))",
        "math.prod(img_size)",
        "places",
    ),
    Mutation(
        "a folder does not grow at its end",
        "extractor.py",
        "- set(wanted)",
        "- set(manifest.shards)",
        "growth",
    ),
    Mutation(
        "places count whatever the spread",
        "detector.py",
        "local = surface * ratio / (1 + ratio)",
        "local = surface / 2",
        "places",
    ),
    Mutation(
        "an image is its mean place",
        "detector.py",
        "return scores.amax(1)",
        "return scores.mean(1)",
        "places",
    ),
    Mutation(
        "a place's covariance is its own alone",
        "normalization.py",
        "covariance += channels / (n + channels) * (pooled - covariance)",
        "",
        "places",
    ),
    Mutation(
        "places without a ridge", "normalization.py", "PLACE_RIDGE * variance", "0 * variance", "places"
    ),
    Mutation(
        "every place has its own mean",
        "normalization.py",
        "(1 - within / between).clamp_min(0) * (own - common)",
        "(own - common)",
        "places",
    ),
    Mutation(
        "no place has its own mean",
        "normalization.py",
        "(1 - within / between).clamp_min(0) * (own - common)",
        "0 * (own - common)",
        "places",
    ),
    Mutation(
        "the deepest depth is a place, too",
        "token_grid.py",
        "return depths[:-1] or depths",
        "return depths",
        "places",
    ),
    Mutation(
        "mirrored places stay mirrored",
        "extractor.py",
        "[features.flip(3) for features in maps]",
        "maps",
        "extractor",
    ),
    Mutation("mirror does nothing", "extractor.py", "if self.config.mirror:", "if False:", "extractor"),
    Mutation(
        "the coreset takes the nearest", "baselines.py", "nearest.argmax()", "nearest.argmin()", "places"
    ),
    Mutation(
        "the patch memory does not reweight",
        "baselines.py",
        "(1 - torch.softmax(among, 1)[:, 0]) * farthest",
        "farthest",
        "places",
    ),
    Mutation(
        "place Gaussians without their ridge",
        "baselines.py",
        "covariance + RIDGE * torch.eye(len(chosen))",
        "covariance + 1e-9 * torch.eye(len(chosen))",
        "places",
    ),
    Mutation(
        "validation without texture defects",
        "outliers.py",
        "KINDS = MEANING | TEXTURE",
        "KINDS = MEANING",
        "validation",
    ),
    Mutation(
        "neighbours' weight ignored",
        "detector.py",
        "torch.tensor([weight * REFERENCES[name]",
        "torch.tensor([REFERENCES[name]",
        "bands",
    ),
    Mutation(
        "low bands left out of the flow",
        "detector.py",
        "torch.cat([tokens, self.low(bands)], 1)",
        "torch.cat([tokens, 0 * self.low(bands)], 1)",
        "bands train",
    ),
    Mutation(
        "rings lose their highest frequencies",
        "token_grid.py",
        "member[:, 0, 0] = 0",
        "member[:, -1, -1] = 0",
        "bands",
    ),
    Mutation("peak is a mean", "token_grid.py", ".amax((2, 3)).sqrt()", ".mean((2, 3)).sqrt()", "bands"),
    Mutation("the start is no epoch", "train.py", "self.evaluate(0, None)", "None", "bands train"),
    Mutation(
        "refit forgets the held-out images",
        "train.py",
        "self._normalize_by(normal)",
        "self._fit_normalizers(data.fit_rows)",
        "train",
    ),
    Mutation("negligible flows are trained", "detector.py", "NEGLIGIBLE = 0.1", "NEGLIGIBLE = 0.0", "bands"),
    Mutation(
        "the resize does not widen its filter",
        "extractor.py",
        "stretch = max(scale, 1.0)",
        "stretch = 1.0",
        "extractor",
    ),
    Mutation(
        "train.py takes every knob",
        "config.py",
        'if script in field.metadata["scripts"]]\n    for name in MOST_USED',
        "]\n    for name in MOST_USED",
        "config",
    ),
    Mutation(
        "p-values without the picture itself",
        "calibration.py",
        "(1 + len(ordered) - np",
        "(len(ordered) - np",
        "calibration",
    ),
    Mutation("threshold one score too low", "calibration.py", "+ 1e-9) - 1)", "+ 1e-9))", "calibration"),
    Mutation(
        "pictures are read far ahead",
        "pictures.py",
        "if len(pending) > ahead",
        "if len(pending) > 9999",
        "predict",
    ),
    Mutation(
        "other weights are taken",
        "pictures.py",
        'self._check({"weights_sha256"',
        '({"weights_sha256"',
        "predict",
    ),
    Mutation(
        "unreadable pictures are no fault",
        "predict.py",
        "return 1 if unreadable else 0",
        "return 0",
        "predict",
    ),
    Mutation(
        "own folders hold nothing out", "config.py", '{"folder": {"holdout": 0.1}}', "{}", "normal_only"
    ),
    Mutation(
        "too few are held out", "detector.py", "n_held = max(n_held,", "n_held = min(n_held,", "normal_only"
    ),
    Mutation(
        "of no rows no batch",
        "detector.py",
        "range(0, max(1, len(index)), size)",
        "range(0, len(index), size)",
        "normal_only",
    ),
    Mutation(
        "an exported file is not compared", "export.py", "if not off <= TOLERANCE", "if False", "export"
    ),
    Mutation(
        "an exported file's p-values rest on another arithmetic",
        "export.py",
        "        loaded.calibrate(pictures)\n",
        "",
        "export",
    ),
    Mutation(
        "the number of pictures is a constant of an exported file",
        "detector.py",
        "tokens.new_zeros(tokens.shape[0], 0, self.channels)",
        "tokens.new_zeros(len(tokens), 0, self.channels)",
        "export",
    ),
    Mutation(
        "onnxruntime takes every core",
        "export.py",
        "options.intra_op_num_threads = torch.get_num_threads()",
        "pass",
        "export",
    ),
    Mutation(
        "every picture counts as anomalous",
        "predict.py",
        '+= line["verdict"] == "anomalous"',
        "+= 1",
        "predict",
    ),
    Mutation(
        "a message of a broken set is another",
        "published.py",
        "its checksum differs",
        "it is bad",
        "messages",
    ),
    Mutation(
        "a run of a sweep goes by half its name",
        "compare.py",
        "if inside else",
        "if not inside else",
        "compare",
    ),
    Mutation(
        "the oracle looks worse than the result",
        "report.py",
        'if summary["config"]["refit"] else ""',
        'if False else ""',
        "report",
    ),
    Mutation(
        "exported p-values forget the picture",
        "export.py",
        "(1 + above) / (1 + len",
        "above / (1 + len",
        "export",
    ),
    Mutation(
        "AUPRO counts pixels, not regions",
        "heat_map.py",
        "share = 1 / np.maximum(sizes, 1)",
        "share = 1 / np.full_like(sizes, sizes.mean())",
        "heat_map",
    ),
    Mutation(
        "regions of 4 neighbours",
        "heat_map.py",
        "ndimage.label(mask, np.ones((3, 3)))",
        "ndimage.label(mask)",
        "heat_map",
    ),
    Mutation(
        "a map on its side",
        "heat_map.py",
        "scores.reshape(grid)",
        "scores.reshape(grid[::-1]).T",
        "heat_map",
    ),
    Mutation("soft clamp's factor", "model.py", "self.clamp * 0.636", "self.clamp * 0.64", "golden"),
    Mutation(
        "log-determinant of one half only",
        "model.py",
        "scale1.sum(1) + scale2.sum(1)\n\n",
        "scale2.sum(1)\n\n",
        "flow golden",
    ),
    Mutation(
        "hi-fi windows summed",
        "freq_fusion.py",
        ".flatten(2) / self.n_windows",
        ".flatten(2)",
        "fusion golden",
    ),
    Mutation(
        "a tensor of C + 1 channels is taken",
        "model.py",
        "        self._check_shapes(x, tokens)\n",
        "",
        "flow",
    ),
    Mutation(
        "paired bootstrap draws differ",
        "utils.py",
        "_rank_auroc(theirs[chosen]",
        "_rank_auroc(theirs[np.sort(chosen)]",
        "utils",
    ),
    Mutation(
        "copysign is exported", "normalization.py", "if is_traced() else", "if False else", "arithmetic"
    ),
    Mutation(
        "threads of extraction all take every core",
        "extractor.py",
        "lambda: torch.set_num_threads(share)",
        "lambda: None",
        "extractor",
    ),
    Mutation(
        "extraction leaves few threads behind",
        "extractor.py",
        "            torch.set_num_threads(threads)  # what threads",
        "            pass  # what threads",
        "extractor",
    ),
    Mutation(
        "features of threads are not tested",
        "extractor.py",
        "if not all(torch.isfinite(values)",
        "if False and not all(torch.isfinite(values)",
        "extractor",
    ),
    Mutation(
        "features of a device are not tested",
        "extractor.py",
        "        if not finite:\n",
        "        if False:\n",
        "extractor",
    ),
    Mutation(
        "a device resizes by torch's float bicubic",
        "extractor.py",
        'if images.device.type == "cpu":  # which resizes',
        "if True:  # which resizes",
        "extractor",
    ),
    Mutation(
        "a class trained together keeps the whole stack",
        "batched.py",
        "        self._part()\n",
        "",
        "batched",
    ),
    Mutation(
        "wide gray is clipped",
        "images.py",
        'if image.mode.startswith("I") or image.mode == "F":',
        'if image.mode == "F":',
        "images",
    ),
    Mutation(
        "EXIF is ignored",
        "images.py",
        "rgb.transpose(TURNS[turn]) if turn in TURNS else rgb",
        "rgb",
        "images",
    ),
    Mutation(
        "transparent keeps its hidden colour",
        "images.py",
        'if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:',
        "if False:",
        "images",
    ),
    Mutation(
        "any number of pixels is decoded",
        "images.py",
        "    bounded(image)\n    image.load()",
        "    image.load()",
        "images",
    ),
    Mutation(
        "progressive JPEGs are decoded whole",
        "images.py",
        ' and not image.info.get("progressive"):',
        ":",
        "images",
    ),
    Mutation(
        "PostScript goes to Ghostscript",
        "images.py",
        'NOT_DECODED = {"EPS", "WMF"',
        'NOT_DECODED = {"WMF"',
        "images",
    ),
    Mutation(
        "a pipe is opened",
        "images.py",
        'return None if entry.is_file() else "no regular file"',
        "return None",
        "images",
    ),
    Mutation(
        "link loops are followed",
        "images.py",
        "        if (found.st_dev, found.st_ino) in entered:",
        "        if False:",
        "images",
    ),
    Mutation(
        "an unreadable folder is passed over",
        "images.py",
        "    except OSError as error:\n        raise UserError(",
        "    except OSError as error:\n        return []\n        raise UserError(",
        "images",
    ),
    Mutation(
        "checkpoints of notebooks are images",
        "images.py",
        'if not e.name.startswith(".") and e.name != NOT_SEARCHED]',
        "if e.name != NOT_SEARCHED]",
        "images",
    ),
    Mutation(
        "images are known by their sizes",
        "images.py",
        "return _hashed(os.fspath(path), found.st_size, found.st_mtime_ns, found.st_ino)",
        "return str(found.st_size)",
        "images datasets",
    ),
    Mutation(
        "the time of change counts",
        "images.py",
        "return _hashed(os.fspath(path), found.st_size, found.st_mtime_ns, found.st_ino)",
        "return str(found.st_mtime_ns)",
        "images",
    ),
    Mutation(
        "two products share a cache",
        "datasets.py",
        'return f"{name}-{hashlib.sha256(',
        'return name or f"{name}-{hashlib.sha256(',
        "datasets",
    ),
    Mutation(
        "kinds of defect are lost",
        "layouts.py",
        "path, number, True, kind, _mask(",
        'path, number, True, "", _mask(',
        "layouts",
    ),
    Mutation(
        "masks are images of tiles",
        "layouts.py",
        'if path.suffix.lower() in (".jpg", ".jpeg")]',
        "]",
        "layouts",
    ),
    Mutation(
        "the split follows the file system",
        "layouts.py",
        "ordered = sorted(files, key=lambda path: (_number(path), path.name))",
        "ordered = list(files)",
        "layouts",
    ),
    Mutation(
        "STL-10 in row order",
        "published.py",
        "reshape(-1, 3, 96, 96).transpose(0, 3, 2, 1)",
        "reshape(-1, 3, 96, 96).transpose(0, 2, 3, 1)",
        "published",
    ),
    Mutation(
        "STL-10's labels from 1",
        "published.py",
        "labels.astype(np.int64) - 1, 10",
        "labels.astype(np.int64), 11",
        "published",
    ),
    Mutation("idx in little-endian", "published.py", '">i4"', '"<i4"', "published"),
    Mutation(
        "CIFAR-100's coarse label is the class",
        "published.py",
        "_labels(r[:, n_labels - 1]",
        "_labels(r[:, 0]",
        "published",
    ),
    Mutation(
        "a failed download leaves folders",
        "published.py",
        "                folder.rmdir()",
        "                pass",
        "published",
    ),
    Mutation(
        "a broken archive is unpacked",
        "published.py",
        "if calculate_md5(path) != source.md5:",
        "if False:",
        "published",
    ),
    Mutation(
        "the unlabelled images are unpacked",
        "published.py",
        "if member.isfile() and name in wanted:",
        "if member.isfile():",
        "published",
    ),
    Mutation(
        "fine classes are not asked for",
        "datasets.py",
        "config.dataset_path, config.fine_classes)",
        "config.dataset_path)",
        "published",
    ),
    Mutation(
        "names in one case only",
        "config.py",
        "return spelt.get(text.lower()) or kind(text)",
        "return kind(text)",
        "config",
    ),
    Mutation(
        "the hub is waited for",
        "backbones.py",
        "before or not utils.reachable(hub.ENDPOINT)",
        "before",
        "extractor",
    ),
    Mutation(
        "matmul bfloat16 does nothing",
        "arithmetic.py",
        'if matmul == "bfloat16" else',
        "if False else",
        "batched",
    ),
    Mutation(
        "a product that loses digits is taken", "arithmetic.py", "error < 1e-4", "error < 1", "arithmetic"
    ),
    Mutation(
        "a spectrum outlives a change of its tokens",
        "freq_fusion.py",
        "state = (tokens._version, ",
        "state = (0, ",
        "fusion",
    ),
    Mutation(
        "spectra are shared where there are gradients",
        "freq_fusion.py",
        "if is_traced() or tokens.requires_grad or",
        "if is_traced() or",
        "fusion",
    ),
    Mutation(
        "tokens reach the flow with gaps",
        "detector.py",
        "tokens[:, 1:].float(), **kept)",
        "tokens.float()[:, 1:], **kept)",
        "train",
    ),
    Mutation(
        "the own token's neighbours count whole",
        "detector.py",
        '"own_reference": 0.5}',
        '"own_reference": 1.0}',
        "bands",
    ),
    Mutation(
        "the own token's normaliser is never fitted",
        "train.py",
        "            fit.own.fit(whole, sample)\n",
        "            pass\n",
        "bands",
    ),
    Mutation("only stacked products are probed", "arithmetic.py", ", (a[0], b[0]))", ",)", "arithmetic"),
    Mutation(
        "TF32 stays on after training",
        "arithmetic.py",
        "    finally:\n        torch.set_float32_matmul_precision(before)\n",
        "    finally:\n        pass\n",
        "arithmetic",
    ),
    Mutation(
        "compile_flow does nothing",
        "train.py",
        "compiled(self.flow) if config.compile_flow else",
        "",
        "batched",
    ),
    Mutation(
        "a gather of all classes is cut wrongly",
        "batched.py",
        ".split(len(batches[0]))",
        ".split(len(batches[0]) - 1)",
        "batched",
    ),
    Mutation(
        "tokens take the whole GPU",
        "detector.py",
        "free - LEFT_FREE * total",
        "free",
        "train",
    ),
    Mutation(
        "terminal: table wider than the screen",
        "tables.py",
        "names = max(8, min(widths[0], width - sum(widths[1:]) - 2 * (len(header) - 1)))",
        "names = widths[0]",
        "report",
    ),
    Mutation("terminal: far-fetched hints", "config.py", "CLOSE = 0.75", "CLOSE = 0.3", "config"),
    Mutation(
        "terminal: bars in log files", "utils.py", "return True if hidden else None", "return hidden", "utils"
    ),
    Mutation(
        "terminal: most used knobs twice or nowhere",
        "config.py",
        "name in read and name not in MOST_USED",
        "name in read",
        "config",
    ),
    Mutation(
        "time left is that of one",
        "main.py",
        "left * result['seconds']",
        "-1 * result['seconds']",
        "main",
    ),
    Mutation(
        "table: undefined as a number",
        "tables.py",
        '"-" if undefined(value) else',
        '"0.0000" if undefined(value) else',
        "report",
    ),
    Mutation(
        "table: undefined classes drag the mean",
        "report.py",
        "defined = values[~np.isnan(values).any(1)]",
        "defined = np.nan_to_num(values)",
        "report",
    ),
    Mutation(
        "table: no reason in the CSV",
        "report.py",
        "*figures, _reason(summary, name)]",
        '*figures, ""]',
        "report",
    ),
    Mutation(
        "table: worst simple detector shown",
        "report.py",
        "return max(defined.items()",
        "return min(defined.items()",
        "report",
    ),
    Mutation(
        "table: kind of defect against everything",
        "report.py",
        "chosen = (labels == 0) | (own == kind)",
        "chosen = labels >= 0",
        "report",
    ),
    Mutation("table: bars of Markdown not escaped", "tables.py", '.replace("|", "\\\\|")', "", "report"),
    Mutation(
        "picture: threshold not drawn",
        "figures.py",
        "handles.append(axes.axvline(found.score",
        "handles.append(axes.axvline(0",
        "figures",
    ),
    Mutation(
        "picture: bins lose the last score",
        "figures.py",
        "inner[[0, -1]] = low, high",
        "inner[[0, -1]] = low, high / 2",
        "figures",
    ),
    Mutation("picture: no logarithmic axis", "figures.py", "RUNS_AWAY = 10", "RUNS_AWAY = 1e9", "figures"),
    Mutation(
        "picture: broken epochs",
        "figures.py",
        "axes.xaxis.set_major_locator(MaxNLocator(integer=True))",
        "pass",
        "figures",
    ),
    Mutation(
        "picture: training loss missing",
        "figures.py",
        'column(history, "loss")',
        'column(history, "held_out_loss")',
        "figures",
    ),
    Mutation(
        "picture: ROC of one label",
        "figures.py",
        'if len(set(r["test"]["labels"])) == 2',
        'if r["test"]["labels"]',
        "figures",
    ),
    Mutation("picture: no deviation", "figures.py", "xerr=spread", "xerr=None", "figures"),
    Mutation("picture: names as formulas", "figures.py", "text.set_parse_math(False)", "pass", "figures"),
    Mutation(
        "picture: tiles stretched",
        "figures.py",
        "ImageOps.pad(Image.fromarray(pixels), (TILE, TILE), Image.Resampling.BICUBIC, (225, 225, 225))",
        "Image.fromarray(pixels).resize((TILE, TILE))",
        "figures",
    ),
    Mutation(
        "picture: tile of another image",
        "figures.py",
        'int(test["rows"][position])',
        "int(position)",
        "figures",
    ),
    Mutation(
        "page: names not escaped",
        "webpage.py",
        "return html.escape(str(value))",
        "return str(value)",
        "webpage",
    ),
    Mutation(
        "page: quotes not escaped",
        "webpage.py",
        "return html.escape(str(value))",
        "return html.escape(str(value), quote=False)",
        "webpage",
    ),
    Mutation(
        "page: pictures fetched",
        "webpage.py",
        'src="data:{KINDS[shown.path.suffix]};base64,{data}"',
        'src="{shown.path}"',
        "webpage",
    ),
    Mutation(
        "page: defaults stand out",
        "webpage.py",
        "if config[name] != defaults.get(name)",
        "if True",
        "webpage",
    ),
    Mutation(
        "page: skipped pictures not told",
        "webpage.py",
        'summary["features"].get("skipped") or []',
        "[]",
        "webpage",
    ),
    Mutation(
        "page: many classes unfolded",
        "webpage.py",
        "if len(names) <= MOST_OPEN else",
        "if True else",
        "webpage",
    ),
    Mutation(
        "two runs: difference turned round", "compare.py", "theirs, ours = (", "ours, theirs = (", "compare"
    ),
    Mutation("two runs: other images compared", "compare.py", "images[0] != images[1] or", "", "compare"),
    Mutation(
        "two runs: unfinished taken for finished",
        "compare.py",
        "if not run.summary:\n        return f",
        "if False:\n        return f",
        "compare",
    ),
    Mutation(
        "two runs: newer classes not seen", "compare.py", "path.stat().st_mtime > written", "False", "compare"
    ),
    Mutation(
        "packing: scale of the whole matrix",
        "packing.py",
        "tensor.abs().amax(1, keepdim=True)",
        "tensor.abs().amax().expand(len(tensor), 1)",
        "packing",
    ),
    Mutation(
        "packing: rounds down",
        "packing.py",
        "(tensor / scale * STEPS).round()",
        "(tensor / scale * STEPS)",
        "packing",
    ),
    Mutation(
        "packing: triangle not mirrored",
        "packing.py",
        "    matrix[columns, rows] = triangle\n",
        "",
        "packing",
    ),
    Mutation(
        "packing: not looked at",
        "detector.py",
        "return packed if same else state",
        "return packed",
        "packing",
    ),
    Mutation("packing: never", "detector.py", "return packed if same else state", "return state", "packing"),
    Mutation("private files", "utils.py", "            partial.chmod(mode)\n", "            pass\n", "utils"),
    Mutation(
        "a shard's rows are not checked when they are read",
        "shards.py",
        "        if damage:\n            raise damaged(self.path, damage)\n        offset",
        "        offset",
        "feature_cache",
    ),
    Mutation(
        "the checksum is not compared",
        "shards.py",
        'if f"{crc:08x}" != self.crc32:',
        "if False:",
        "feature_cache",
    ),
    Mutation(
        "values that are not finite are written",
        "shards.py",
        "        if not finite(data):\n",
        "        if False:\n",
        "feature_cache",
    ),
    Mutation(
        "a file's header is not compared",
        "shards.py",
        "return None if found == header else",
        "return None if True else",
        "feature_cache",
    ),
    Mutation(
        "a shard is put in its place before it is written",
        "shards.py",
        "utils.partial_of(path)",
        "path",
        "feature_cache",
    ),
    Mutation(
        "a record does not know its images",
        "cache_writer.py",
        '"images": self.part_key(shard),',
        '"images": "",',
        "feature_cache extractor",
    ),
    Mutation(
        "a record does not know its features",
        "cache_writer.py",
        '"features": manifest.features_sha256,',
        '"features": "",',
        "feature_cache",
    ),
    Mutation(
        "a shard in work elsewhere is worked on",
        "cache_writer.py",
        "            if not lock.take():\n                return False\n",
        "            lock.take()\n",
        "feature_cache",
    ),
    Mutation(
        "unreadable images are left out unasked",
        "cache_writer.py",
        "if skipped and not self.skip:",
        "if False:",
        "feature_cache",
    ),
    Mutation(
        "only the first shard's unreadable images are named",
        "cache_writer.py",
        "        for shard in missing:\n            for i in utils",
        "        for shard in missing[:1]:\n            for i in utils",
        "feature_cache",
    ),
    Mutation(
        "leftovers stay in a finished cache",
        "cache_writer.py",
        "                tidy(self.folder)\n",
        "",
        "feature_cache",
    ),
    Mutation(
        "leftovers: any hidden file goes",
        "cache_writer.py",
        "if LEFT_OVER.fullmatch(path.name):",
        "if path.name.startswith('.') and path.name != '.lock':",
        "feature_cache",
    ),
    Mutation(
        "an unfinished cache is read",
        "feature_cache.py",
        "if not self.manifest.finished:",
        "if False:",
        "feature_cache",
    ),
    Mutation(
        "the labels' checksum is not compared",
        "feature_cache.py",
        "same = utils.sha256_of_text(text) == manifest.labels_sha256",
        "same = True",
        "feature_cache",
    ),
    Mutation(
        "a manifest's checksum is not compared",
        "utils.py",
        'if content["checksum"] != checksum(content):',
        "if False:",
        "feature_cache",
    ),
    Mutation(
        "labels keep the images that are left out",
        "feature_cache.py",
        "self.all_labels.split(split).kept(self.image_rows(split))",
        "self.all_labels.split(split)",
        "feature_cache",
    ),
    Mutation(
        "anything may lie in a new cache's folder",
        "manifest.py",
        "any(not _is_ours(path.name) for path in folder.iterdir())",
        "False",
        "feature_cache",
    ),
    Mutation(
        "extraction takes no notice of restart",
        "extractor.py",
        "        start_again(folder)\n",
        "        pass\n",
        "extractor",
    ),
    Mutation(
        "a set of other images replaces the features",
        "cache_writer.py",
        "        if recorded and not there:",
        "        if False:",
        "extractor",
    ),
    Mutation(
        "a batch across shards takes the first shard's rows",
        "shards.py",
        'numbers = np.searchsorted(self._starts, index, "right") - 1',
        "numbers = np.zeros(len(index), int)",
        "feature_cache",
    ),
    Mutation(
        "the backbone is built before the disk is checked",
        "extractor.py",
        "    check_disk(identity.folder, images.labels, shapes)\n    job",
        "    job",
        "extractor",
    ),
    Mutation(
        "ranks begin at the same shard",
        "utils.py",
        "turns = range(self.rank, self.rank + self.world_size)",
        "turns = range(self.world_size)",
        "utils feature_cache",
    ),
    Mutation(
        "a forked child keeps its parent's locks",
        "utils.py",
        "os.register_at_fork(after_in_child=_forget_locks)",
        "",
        "utils",
    ),
    Mutation(
        "a signal while modules are imported is a traceback",
        "config.py",
        "    if argv is None:\n        end_at_once_on_signals()\n",
        "",
        "faults",
    ),
    Mutation(
        "table: dashes where thresholds are all there is to tell",
        "report.py",
        'if nothing_tested(summary) and summary.get("thresholds")',
        "if False",
        "report",
    ),
    Mutation(
        "page: no thresholds",
        "webpage.py",
        'section("Thresholds", table(*report.threshold_table(summary)))',
        '""',
        "webpage",
    ),
    Mutation(
        "rows are handed on before their copy has ended",
        "extractor.py",
        "    event.synchronize()\n",
        "",
        "extractor",
    ),
    Mutation(
        "a copy does not wait for its features",
        "extractor.py",
        "        stream.wait_stream(torch.cuda.current_stream(device))\n",
        "",
        "extractor",
    ),
    Mutation(
        "a class that failed counts as fitted in the list of runs",
        "compare.py",
        "if not path.name.endswith(runs.FAILED)",
        "if True",
        "compare",
    ),
    Mutation(
        "a long host's name makes a file's name too long",
        "utils.py",
        "socket.gethostname()[-LONGEST_HOST:]",
        "socket.gethostname()",
        "utils",
    ),
    Mutation(
        "a validation set of too few images is a traceback",
        "datasets.py",
        " if rows[split] else Split.of([], [])",
        "",
        "validation",
    ),
    Mutation(
        "a picture of a run may be half there",
        "heat_map.py",
        "    with utils.whole_file(path) as partial:\n        figure.savefig(partial",
        "    path.parent.mkdir(parents=True, exist_ok=True)\n    if True:\n        figure.savefig(path",
        "figures",
    ),
    Mutation(
        "train_together trains one by one",
        "main.py",
        'together = config.train_together == "True"',
        "together = False",
        "main",
    ),
    Mutation(
        "a record whose parts are none is taken for one",
        "records.py",
        "        _check(path, content[part], shape)",
        "        pass",
        "checkpoint",
    ),
    Mutation(
        "the local flow draws its places by the run's first seed",
        "train.py",
        "self.generator = np.random.RandomState(seed)  # of places",
        "self.generator = np.random.RandomState(config.seed)",
        "places",
    ),
    Mutation(
        "a refit that diverges is a traceback",
        "train.py",
        "        self._normalize_by(normal)",
        "        self._fit_normalizers(normal)",
        "train",
    ),
    Mutation(
        "the list of images is written while another process tidies up",
        "growth.py",
        'with utils.Lock(folder / ".lock"):',
        "if True:",
        "growth",
    ),
    Mutation(
        "the readers' pictures come as they are read",
        "extractor.py",
        "yield pending.popleft().result()\n    while",
        "yield pending.pop().result()\n    while",
        "extractor",
    ),
    Mutation(
        "what ranks do at the same time is added up",
        "runs.py",
        'start = max(result["ended"] - result["wall_time_s"], until)',
        'start = result["ended"] - result["wall_time_s"]',
        "runs",
    ),
    Mutation(
        "a share has no end",
        "runs.py",
        '{"wall_time_s": self.lap(), "ended": round(time.time(), 3)}',
        '{"wall_time_s": self.lap(), "ended": 0.0}',
        "runs",
    ),
    Mutation(
        "main extracts for a flow that does not fit",
        "main.py",
        "device, functools.partial(detector.Detector, config))",
        "device)",
        "main",
    ),
    Mutation(
        "train extracts for a flow that does not fit",
        "train.py",
        "device, functools.partial(Detector, config))",
        "device)",
        "main",
    ),
    Mutation(
        "parameters keep Adam's moments",
        "train.py",
        "weak = weakref.ref(self)  #",
        "weak = lambda: self  #",
        "train",
    ),
    Mutation(
        "freed memory goes back",
        "utils.py",
        "        mallopt(M_TRIM_THRESHOLD, KEPT_FREE)\n",
        "",
        "utils",
    ),
    Mutation(
        "a computed job has the memory of a small one",
        "benchmarks/whole_job.py",
        "(1, images, classes > 1)",
        "(1, min(images, 1000), classes > 1)",
        "benchmarks",
    ),
    Mutation(
        "a spectrum is of any grid",
        "freq_fusion.py",
        "_version, self.grid, torch",
        "_version, torch",
        "fusion",
    ),
    Mutation(
        "a spectrum is of any precision",
        "freq_fusion.py",
        "self.grid, torch.is_autocast_enabled(tokens.device.type))",
        "self.grid)",
        "fusion",
    ),
    Mutation(
        "the own token's whitening takes no memory",
        "memory.py",
        "(1 + config.knows_own_token) * channels**2",
        "channels**2",
        "memory",
    ),
    Mutation(
        "patch statistics of a flow with fusion are not fitted",
        "normalization.py",
        '{"patch": patches} if self.patches_used else {}',
        "{}",
        "train normalization",
    ),
    Mutation(
        "the median of the whole jobs is their last",
        "benchmarks/whole_job.py",
        "what: statistics.median(run[what] for run in runs) for",
        "what: runs[-1][what] for",
        "benchmarks",
    ),
    Mutation(
        "the ablation's rows share features that differ",
        "tools/ablation.py",
        "    if row.own_features:",
        "    if False:",
        "ablation",
    ),
    Mutation(
        "a failed row of the ablation counts",
        "tools/ablation.py",
        "        if process.wait():",
        "        if process.wait() is None:",
        "ablation",
    ),
]


def copy_of_the_tree(folder: Path) -> Path:
    """The tracked files of the repository in a new folder."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in names.splitlines():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    return folder


def run_tests(folder: Path, tests: str) -> str:
    """The first test that dies in the copy, or "" when all live."""
    files = [f"tests/test_{name}.py" for name in tests.split()]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *files]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    if done.returncode == 0:
        return ""
    dead = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return dead[0].split(" - ")[0].split("::")[-1] if dead else "the test run itself"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("word", nargs="?", default="", help="only mutations whose name holds it")
    chosen = [mutation for mutation in MUTATIONS if parser.parse_args().word in mutation.name]
    survivors = []
    print("| mutation | file | test that died | seconds |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = copy_of_the_tree(Path(name))
        tests = " ".join(dict.fromkeys(test for mutation in chosen for test in mutation.tests.split()))
        if dead := run_tests(folder, tests):
            raise SystemExit(f"without any mutation {dead} fails")
        for mutation in chosen:
            path = folder / mutation.file
            text = path.read_text()
            if mutation.old not in text:
                raise SystemExit(f"{mutation.name}: {mutation.file} holds no {mutation.old!r}")
            path.write_text(text.replace(mutation.old, mutation.new, 1))
            start = time.perf_counter()
            dead = run_tests(folder, mutation.tests)
            path.write_text(text)
            survivors += [] if dead else [mutation.name]
            seconds = time.perf_counter() - start
            print(f"| {mutation.name} | {mutation.file} | {dead or 'NONE'} | {seconds:.0f} |", flush=True)
    print(f"\n{len(chosen)} mutations, {len(survivors)} survived: {', '.join(survivors) or 'none'}")
    return int(bool(survivors))


if __name__ == "__main__":
    sys.exit(main())
