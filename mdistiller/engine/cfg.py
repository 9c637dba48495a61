"""The configuration: defaults, YAML files with `_BASE_`, command-line overrides, type checks.

Defaults live beside the code they steer: each distiller registers its own node, the data package
its `DATASET` node; this file adds what the engine reads. A key that has no default is an error that
names the nearest one.
"""

from __future__ import annotations

import ast
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from mdistiller.dataset import DATASET_CONFIG
from mdistiller.distillers import DISTILLERS
from mdistiller.distillers._compose import part_names
from mdistiller.distillers._standardize import LSKD_CONFIG
from mdistiller.engine.imports import import_user_modules, is_file, resolve_imports
from mdistiller.engine.safe_yaml import LIMIT, parse_yaml, shown
from mdistiller.registry import UserError, suggest
from mdistiller.runtime import config_root

ENGINE_CONFIG: dict[str, Any] = {
    "EXPERIMENT": {
        "PROJECT": "distill",
        "NAME": "",
        "TAG": "default",
        "SEED": 0,
        "LOGIT_STAND": False,  # LSKD.ENABLE by the name that forks use
    },
    "DISTILLER": {
        "TYPE": "NONE",  # a method, or several: "KD+AT"
        "CE_WEIGHT": 1.0,  # of the cross-entropy, where methods are combined
        "TEACHER": "ResNet50",
        "STUDENT": "resnet32",
        "TEACHER_ARGS": {},  # keyword arguments of the network's constructor, where it takes any
        "STUDENT_ARGS": {},
        # Normalisation of the images that a network sees: data (the data set's), own (that of its
        # released weights), auto (own if it starts from those, else data) or [[mean], [std]].
        "TEACHER_NORM": "auto",
        "STUDENT_NORM": "auto",
        "TEACHER_CKPT": "",  # a file; empty: the zoo's own place, else TEACHER_CFG
        "TEACHER_CFG": "",  # a config that trains the teacher first
        "TEACHER_FOLD": True,  # run a frozen teacher folded and in channels_last: the same, faster
        "TEACHER_DTYPE": "auto",  # of a frozen teacher: fp32, bf16, fp16, or auto: as SOLVER.AMP
        "TEACHER_CACHE": "none",  # remember a frozen teacher's logits: none, memory or disk
        "TEACHER_CACHE_GB": 4.0,  # at most so much, 1e9 bytes, for a teacher and a data set
        "TEACHER_CACHE_DIR": "",  # disk: the folder; empty: teacher_cache in LOG.PREFIX
    },
    "LSKD": LSKD_CONFIG,  # standardised logits in the distillation loss
    "SOLVER": {
        "TRAINER": "base",
        "BATCH_SIZE": 64,  # per process and micro-batch
        "ACCUMULATE": 1,  # micro-batches to an optimizer step
        "EPOCHS": 240,
        "LR": 0.05,
        "SCHEDULE": "multistep",  # multistep, cosine, plateau or constant
        "LR_DECAY_STAGES": [150, 180, 210],
        "LR_DECAY_RATE": 0.1,
        "PATIENCE": 10,  # plateau: epochs without a lower training loss that are put up with
        "WARMUP_EPOCHS": 0,  # epochs of linear warm-up of the learning rate
        "MIN_LR": 0.0,  # where the cosine ends
        "WEIGHT_DECAY": 0.0001,
        "NORM_DECAY": True,  # weight decay on biases and norms, too
        "MOMENTUM": 0.9,
        "NESTEROV": False,
        "TYPE": "SGD",  # SGD, Adam or AdamW
        "CLIP_GRAD_NORM": 0.0,  # 0: no clipping
        "AMP": "none",  # none, bf16 or fp16
        "EMA": 0.0,  # decay a step of the student's moving average; 0: none is kept
        "SYNC_BN": False,  # several processes: batch norm by the statistics of all
        "COMPILE": False,  # torch.compile; True, or its mode
        "CHANNELS_LAST": False,  # images and convolutions in torch.channels_last memory format
        "DETERMINISTIC": False,  # CUDA: reproducible kernels, slower
        "FIND_UNUSED_PARAMETERS": False,  # several processes: a method leaves parameters unused
        "SKIP_NONFINITE": 0,  # steps of a run that a loss or gradient that is not finite may cost
        "RANK_TIMEOUT": 30.0,  # several processes: minutes to wait for another one in a step
        "DOT": {"DELTA": 0.075},
    },
    "LOG": {
        "TENSORBOARD_FREQ": 500,  # training steps between points of the step curves
        "SAVE_CHECKPOINT_FREQ": 40,  # epochs between the numbered checkpoints
        "KEEP_CHECKPOINTS": 0,  # numbered checkpoints to keep, the newest; 0: all
        "SAVE_EVERY_MINUTES": 15.0,  # saves `latest` within epochs as well; 0: after epochs only
        "SAFETENSORS": False,  # students also in that format; needs the package
        "PREFIX": "./output",
        "WANDB": False,
    },
    "DEVICE": "auto",
    "IMPORTS": [],  # user files or modules that register methods, models, data sets
}
NORMS = ("DISTILLER.TEACHER_NORM", "DISTILLER.STUDENT_NORM")  # text or lists


SWITCHES_OR_TEXT = ("SOLVER.COMPILE",)
"""Keys whose values are True, False or a word."""
_MOST_FILES = 100  # that one config is built of
_LONGEST = 20_000  # characters of a value on the command line
_DEEPEST = 20  # sections or lists within one another
_MOST_SIGNS = 2_000  # brackets and signs in it
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


class Config(CfgNode):
    """A yacs node that names the nearest key, takes ints for floats and reads only YAML."""

    def merge_from_file(self, cfg_filename: str | Path) -> None:
        """Merge a YAML file, its `_BASE_` files first; modules under IMPORTS are imported."""
        self._merge_root(read_yaml(Path(cfg_filename)))

    def merge_from_list(self, cfg_list: Sequence[Any]) -> None:
        """Merge `[key, value, key, value, ...]`; string values are read as Python literals."""
        if len(cfg_list) % 2:
            raise UserError(
                f"overrides come as KEY VALUE pairs, but {shown(cfg_list[-1])} has no partner"
            )
        for key, value in zip(cfg_list[0::2], cfg_list[1::2], strict=True):
            if not isinstance(key, str) or not all(key.split(".")) or key.count(".") > _DEEPEST:
                raise UserError(f"{shown(key)} is no config key (a key looks like SOLVER.LR)")
            nested: Any = value
            for part in reversed(key.split(".")):
                nested = {part: nested}
            self._merge_root(nested)

    def merge_from_other_cfg(self, cfg_other: Mapping[str, Any]) -> None:
        """Merge another config or a nested mapping."""
        self._merge_root(cfg_other)

    def _merge_root(self, incoming: Mapping[str, Any]) -> None:
        if self.is_frozen():
            raise AttributeError("this config is frozen; clone() and defrost() it to change it")
        if "SWEEP" in incoming:
            raise UserError(
                f"SWEEP: {shown(incoming['SWEEP'])} is a sweep: run it with tools/sweep.py"
            )
        if "DETECTION" in incoming and "DETECTION" not in self:
            raise UserError(
                "DETECTION: this is for a detector: run it with tools/train_detection.py"
            )
        modules = resolve_imports(literal(incoming.get("IMPORTS") or [], "IMPORTS"), Path())
        if modules:  # they add up; what they register has to be known before its keys are read
            import_user_modules(modules)
            add_registered_nodes(self)
            self["IMPORTS"] = list(dict.fromkeys([*self["IMPORTS"], *modules]))
        merge(self, {k: v for k, v in incoming.items() if k != "IMPORTS"}, (), root=self)


def find_config(name: str | Path) -> Path:
    """The file for a config name: as given, else below the package's own `configs/`."""
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(
            f"config {shown(str(name))} is not a .yaml file (Python configs would run code: "
            "refused)"
        )
    parts = path.parts[1:] if path.parts[:1] == ("configs",) else path.parts
    for candidate in (path, config_root().joinpath(*parts)):
        if is_file(candidate):
            return candidate
    known = [p.relative_to(config_root()).as_posix() for p in config_root().rglob("*.yaml")]
    raise UserError(f"config file {shown(str(name))} not found{suggest('/'.join(parts), known)}")


def read_yaml(path: Path, chain: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The nested mapping of a YAML file, over that of its `_BASE_` file or files."""
    return _read_yaml(path, chain, count(1))


def _read_yaml(path: Path, chain: tuple[Path, ...], reads: Iterator[int]) -> dict[str, Any]:
    path = find_config(path)
    resolved = path.resolve()
    if resolved in chain:
        raise UserError(f"{path}: _BASE_ leads back to itself ({' -> '.join(map(str, chain))})")
    if next(reads) > _MOST_FILES:
        raise UserError(f"{path}: _BASE_ reads more than {_MOST_FILES} files")
    try:
        if path.stat().st_size > 4 * LIMIT:  # bytes of a character
            raise ValueError(f"it has {path.stat().st_size} bytes")
        table = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is no valid YAML: {error}") from None
    if not isinstance(table, dict):
        raise UserError(f"{path} holds no config (want sections of KEY: VALUE)")
    bases = table.pop("_BASE_", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise UserError(f"{path}: _BASE_ must name a file or a list of files, got {shown(bases)}")
    resolve_paths(table, path.parent)
    merged: dict[str, Any] = {}
    for base in bases:
        beside = path.parent / base
        file = beside if is_file(beside) else Path(base)  # "configs/..." works from anywhere
        merged = overlay(merged, _read_yaml(file, (*chain, resolved), reads))
    imports = [*merged.get("IMPORTS", []), *table.pop("IMPORTS", [])]
    return overlay(merged, {**table, "IMPORTS": imports} if imports else table)


def resolve_paths(table: dict[str, Any], folder: Path) -> None:
    """Make the files that a config names relative to itself absolute, in place."""
    if table.get("IMPORTS"):
        table["IMPORTS"] = resolve_imports(table["IMPORTS"], folder)
    settings = table.get("DISTILLER")
    if isinstance(settings, dict) and isinstance(settings.get("TEACHER_CFG"), str):
        teacher = folder / settings["TEACHER_CFG"]
        if is_file(teacher):
            settings["TEACHER_CFG"] = str(teacher.resolve())


def overlay(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` laid over `below`, section by section."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = overlay(merged[key], value) if both else value
    return merged


def merge(node: CfgNode, incoming: Mapping[str, Any], path: tuple[str, ...], root: CfgNode) -> None:
    """Write `incoming` into `node` in place, checking every key and type."""
    for key, value in incoming.items():
        if not isinstance(key, str):
            raise UserError(f"{shown(key)} in {'.'.join(path)} is no config key")
        name = ".".join((*path, key))
        if value is None:  # "KEY:" without a value leaves the default
            value = {} if isinstance(node.get(key), CfgNode) else node.get(key)
        if key not in node:
            if not node.is_new_allowed():
                raise UserError(unknown_key(name, node, path, root))
            node[key] = as_new(value, name)
        elif isinstance(node[key], CfgNode):
            value = literal(value, name)  # of the command line: "{'patch_size': 4}"
            if not isinstance(value, Mapping):
                raise UserError(
                    f"{name} is a section with keys {', '.join(node[key])}, got {shown(value)}"
                )
            merge(node[key], value, (*path, key), root)
        else:
            node[key] = coerce(value, node[key], name)


def as_new(value: Any, name: str) -> Any:
    """`value` for a key without default: plain, a mapping as a node."""
    if isinstance(value, Mapping) and name.count(".") < _DEEPEST:
        node = Config(new_allowed=True)
        merge(node, value, (name,), node)
        return node
    value = literal(value, name)
    if isinstance(value, Mapping) and name.count(".") < _DEEPEST:  # spelled on the command line
        return as_new(value, name)
    if is_plain(value):
        return value
    raise UserError(
        f"{name} wants a number, text, True, False, or lists and sections of these, got "
        f"{shown(value)}"
    )


def is_plain(value: Any, depth: int = 0) -> bool:
    """Whether a config keeps a value: text, numbers (whole ones of 64 bits), nests of such."""
    if depth > _DEEPEST:
        return False
    if isinstance(value, (list, tuple)):
        return all(is_plain(item, depth + 1) for item in value)
    if isinstance(value, Mapping):
        return all(isinstance(k, str) and is_plain(v, depth + 1) for k, v in value.items())
    if isinstance(value, int):
        return abs(value) < 2**63
    return value is None or isinstance(value, (float, str))


def unknown_key(name: str, node: CfgNode, path: tuple[str, ...], root: CfgNode) -> str:
    """The error for a key that does not exist: the nearest beside it, else the nearest of all."""
    siblings = [".".join((*path, key)) for key in node]
    nearest = suggest(name, siblings) or (suggest(name, flatten(root)) if not path else "")
    known = f" (keys of {'.'.join(path)}: {', '.join(node)})" if path and not nearest else ""
    plain = name if name.isprintable() and len(name) <= 120 else shown(name)
    return f"unknown config key {plain}{nearest}{known}"


def coerce(value: Any, default: Any, name: str) -> Any:
    """`value` as the type of `default`; ints become floats, lists and tuples interchange."""
    if name in NORMS:
        return check_norm(literal(value, name), name)
    if name in SWITCHES_OR_TEXT:
        return _switch_or_text(literal(value, name), name)
    if isinstance(default, str):
        if isinstance(value, str):
            return value
        if isinstance(value, (int, float)) and not isinstance(value, bool) and is_plain(value):
            return str(value)
        raise UserError(f"{name} wants text, got {shown(value)}")
    value = literal(value, name)
    if isinstance(default, bool):
        if isinstance(value, str) and value.lower() in ("true", "false"):
            value = value.lower() == "true"
        fits = isinstance(value, bool)
    elif isinstance(default, float):
        fits = isinstance(value, (int, float)) and not isinstance(value, bool)
        fits = fits and is_plain(value) and math.isfinite(value)
        value = float(value) if fits else value
    elif isinstance(default, int):
        fits = isinstance(value, int) and not isinstance(value, bool) and is_plain(value)
    elif isinstance(default, (list, tuple)):
        fits = isinstance(value, (list, tuple)) and _items_fit(value, default)
        value = type(default)(value) if fits else value
    else:
        fits = True
    if not fits:
        raise UserError(f"{name} wants {_describe(default)}, got {shown(value)}")
    return value


def check_norm(value: Any, name: str) -> Any:
    """`value` if it names a normalisation, or is a mean and a std of three channels."""
    if value in ("auto", "data", "own"):
        return value
    found = read_statistics(value)
    if found is not None:
        return found
    raise UserError(
        f"{name} must be auto, data, own or [[mean], [std]] with three values each up to 1 (images "
        f"in [0, 1]), those of std above 0, got {shown(value)}"
    )


def read_statistics(value: Any) -> list[list[float]] | None:
    """`value` as [mean, std] of three channels, for images in [0, 1]; None if it is none."""
    pair = value if isinstance(value, (list, tuple)) and len(value) == 2 else ()
    rows = [row for row in pair if isinstance(row, (list, tuple)) and len(row) == 3]
    if len(rows) == 2 and all(type(x) in (int, float) for row in rows for x in row):
        mean, std = ([float(x) for x in row] for row in rows)
        if all(map(math.isfinite, mean + std)) and max(mean + std) <= 1 and min(std) > 0:
            return [mean, std]
    return None


def _switch_or_text(value: Any, name: str) -> bool | str:
    value = {"true": True, "false": False}.get(str(value).lower(), value)
    if not isinstance(value, (bool, str)):
        raise UserError(f"{name} wants True, False or text, got {shown(value)}")
    return value


def _items_fit(items: Sequence[Any], default: Sequence[Any]) -> bool:
    allowed = {type(item) for item in default} or {int, float, str}
    allowed |= {int} if float in allowed else set()
    return all(type(item) in allowed and is_plain(item) and item == item for item in items)


def _describe(default: Any) -> str:
    if isinstance(default, bool):
        return "True or False"
    if isinstance(default, int):
        return "a whole number"
    if isinstance(default, float):
        return "a finite number"
    return f"a list like {list(default) or [1, 2]}"


def literal(value: Any, name: str = "") -> Any:
    """Text as the Python literal it spells, if it spells one ("1e-3", "[1, 2]"); else unchanged.

    Raises:
        UserError: a text too long, or nested too deep, to be looked at.
    """
    if not isinstance(value, str):
        return value
    if len(value) > _LONGEST or sum(map(value.count, "([{-+~")) > _MOST_SIGNS:
        raise UserError(f"{name or 'a value'} is too long or too deeply nested: {shown(value)}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about strange escapes in what is meant as text
            return ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return value


def flatten(node: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted names of all values below a node."""
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def add_registered_nodes(cfg: CfgNode) -> None:
    """Add the default nodes of methods that were registered since `cfg` was made."""
    for name in DISTILLERS:
        if name not in cfg and name != "NONE":
            declared = DISTILLERS.config.get(name)
            cfg[name] = Config(declared or {}, new_allowed=declared is None)


def default_config() -> Config:
    """A fresh config that holds every default."""
    cfg = Config({**ENGINE_CONFIG, "DATASET": DATASET_CONFIG}).clone()
    for role in ("TEACHER", "STUDENT"):
        cfg.DISTILLER[f"{role}_ARGS"] = Config(new_allowed=True)
    add_registered_nodes(cfg)
    return cfg


def load_config(
    path: str | Path | Mapping[str, Any] = "",
    overrides: Sequence[str] = (),
    imports: Sequence[str] = (),
    defaults: Config | None = None,
) -> Config:
    """Defaults, then the file, then `[key, value, ...]`; checked, and frozen.

    Args:
        path: of a YAML file, or what one holds.
        imports: further IMPORTS, relative to the working directory.
        defaults: of another kind of run than classification.
    """
    cfg = (CFG if defaults is None else defaults).clone()
    if defaults is None:
        add_registered_nodes(cfg)
    if imports:
        cfg.merge_from_list(["IMPORTS", list(imports)])
    if isinstance(path, Mapping):
        cfg.merge_from_other_cfg(path)
    elif path:
        cfg.merge_from_file(path)
    cfg.merge_from_list(overrides)
    check_values(cfg)
    cfg.freeze()
    return cfg


def check_values(cfg: CfgNode) -> None:
    """Refuse values that have the right type and no meaning."""
    at_least = {
        "SOLVER.BATCH_SIZE": 1,
        "SOLVER.ACCUMULATE": 1,
        "SOLVER.EPOCHS": 1,
        "SOLVER.WARMUP_EPOCHS": 0,
        "SOLVER.PATIENCE": 0,
        "SOLVER.WEIGHT_DECAY": 0,
        "SOLVER.MOMENTUM": 0,
        "SOLVER.CLIP_GRAD_NORM": 0,
        "SOLVER.EMA": 0,
        "SOLVER.MIN_LR": 0,
        "SOLVER.SKIP_NONFINITE": 0,
        "DATASET.TEST.BATCH_SIZE": 1,
        "DATASET.VAL_SPLIT": 0,
        "LOG.TENSORBOARD_FREQ": 1,
        "LOG.SAVE_CHECKPOINT_FREQ": 1,
        "LOG.KEEP_CHECKPOINTS": 0,
        "LOG.SAVE_EVERY_MINUTES": 0,
        "EXPERIMENT.SEED": 0,
        "LSKD.EPS": 0,
    }
    values = {name: lookup(cfg, name) for name in flatten(cfg)}  # a kind of run may lack some
    for name, low in at_least.items():
        if values.get(name, low) < low:
            raise UserError(f"{name} must be at least {low}, got {values[name]}")
    for name in ("DATASET.MEAN", "DATASET.STD"):
        if any(type(item) not in (int, float) for item in values.get(name, ())):
            raise UserError(f"{name} wants numbers, got {shown(values[name])}")
    if cfg.SOLVER.NESTEROV and not cfg.SOLVER.MOMENTUM:
        raise UserError("SOLVER.NESTEROV needs a SOLVER.MOMENTUM above 0")
    if cfg.SOLVER.SCHEDULE == "plateau":
        if values.get("SOLVER.WARMUP_EPOCHS"):
            raise UserError("SOLVER.SCHEDULE plateau has no warm-up: set SOLVER.WARMUP_EPOCHS 0")
        if not 0 < cfg.SOLVER.LR_DECAY_RATE < 1:
            raise UserError(
                "SOLVER.SCHEDULE plateau needs a SOLVER.LR_DECAY_RATE between 0 and 1, got "
                f"{cfg.SOLVER.LR_DECAY_RATE}"
            )
    if cfg.SOLVER.EMA >= 1:
        raise UserError(f"SOLVER.EMA must be below 1 (0.999, say; 0: none), got {cfg.SOLVER.EMA}")
    for name in ("SOLVER.LR", "SOLVER.RANK_TIMEOUT", "DISTILLER.TEACHER_CACHE_GB"):
        if values.get(name, 1.0) <= 0:
            raise UserError(f"{name} must be positive, got {values[name]}")
    for name, allowed in (
        ("SOLVER.AMP", ("none", "bf16", "fp16")),
        ("DISTILLER.TEACHER_DTYPE", ("auto", "fp32", "bf16", "fp16")),
        ("DISTILLER.TEACHER_CACHE", ("none", "memory", "disk")),
        ("SOLVER.SCHEDULE", ("multistep", "cosine", "plateau", "constant")),
        ("SOLVER.COMPILE", (True, False, *COMPILE_MODES)),
    ):
        if values.get(name, allowed[0]) not in allowed:
            known = ", ".join(map(str, allowed))
            raise UserError(f"{name} must be one of {known}, got {shown(values[name])}")


def lookup(cfg: CfgNode, name: str) -> Any:
    """The node or value with a dotted name."""
    for part in name.split("."):
        cfg = cfg[part]
    return cfg


def own_sections(cfg: CfgNode) -> list[str]:
    """Sections that a kind of run has beside those of classification."""
    return [key for key in cfg if key not in {*ENGINE_CONFIG, "DATASET", *DISTILLERS}]


def dump_cfg(cfg: CfgNode) -> str:
    """YAML of all that matters for a run: every common key, and its method's node."""
    keys = [*ENGINE_CONFIG, "DATASET", *part_names(cfg.DISTILLER.TYPE), *own_sections(cfg)]
    text: str = CfgNode({key: cfg[key] for key in keys if key in cfg}).dump(sort_keys=False)
    return text


def show_cfg(cfg: CfgNode) -> str:
    """Print and return :func:`dump_cfg`."""
    text = dump_cfg(cfg)
    print(text)
    return text


CFG = default_config()
