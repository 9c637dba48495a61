"""What every distillation method is made of."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from mdistiller.distillers._common import cross_entropy, full_precision, missing_feature
from mdistiller.distillers._facts import TeacherFact
from mdistiller.distillers._init_stage import InitPlan
from mdistiller.distillers._returned import loss_of, require_call
from mdistiller.distillers._split import Split
from mdistiller.distillers._standardize import lskd_settings, standardize
from mdistiller.registry import Registry, UserError

DISTILLERS = Registry("distiller (DISTILLER.TYPE)")
Losses = dict[str, Tensor]
_TEACHER_SEAMS = ("run_teacher", "forward_train", "forward")
_STEPS = {"distill", "forward_train", "forward", "init_loss", "forward_init"}


@dataclass
class Output:
    """What a network returned: logits [N, C] in full precision, and its features.

    `output["feats"]` gives a feature in full precision; `output.features` holds them as returned.
    """

    logits: Tensor
    features: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        if name not in self.features:
            raise missing_feature(name, self.features)
        return full_precision(self.features[name])


class Distiller(nn.Module):
    """A student and a teacher trained as one module; the base of every method.

    Most methods override :meth:`distill`; one of another shape (several views, no cross-entropy,
    an own head) overrides :meth:`forward_train`, and perhaps :meth:`forward_test`. Modules,
    parameters and buffers that a method adds are ordinary children: they are found, moved, saved
    and trained without further word.

    Class attributes:
        uses_teacher: False for methods that learn without one; they are built with None.
        teacher_in_eval_mode: False if the teacher normalises by batch statistics while the student
            trains; its running statistics then move, nothing else of it.
        alone: why the method is no part of a sum ("it ..."); empty if it can be.
        takes_standardized_logits: True if what :meth:`distill` does with logits makes sense for
            standardised ones (LSKD); it then gets such where the config says so.
        teacher_logits_only: True if the training step reads nothing of the teacher but its logits.
            Remembered ones can then stand in for a forward pass of it, in a class that leaves
            `forward_train`, `run_teacher` and `forward` as they are. A class that overrides
            `distill` does not inherit it: it has to say so itself.
        needs_teacher_classifier: False if nothing depends on the teacher's logits or the layer that
            makes them: a teacher of other classes serves, and a file without that layer. A class
            that overrides a training step does not inherit False: it has to say so itself.
        two_views: True for methods that train on two independently augmented views of an image. The
            training loader then gives pairs (weak, strong), and :meth:`forward_train` gets them as
            `image_weak` and `image_strong`. It is set by itself where `forward_train` names two
            arguments that begin with `image_`, which then get the pair (:func:`view_names`).
        soft_labels: whether it can learn from mixed images: `target` is then [N, C] class
            probabilities, which the cross-entropy takes, and `index` names one of the two images.
        relates_images: True if the maps of one image are compared with those of the others.
        own_state: prefixes of buffers that the method itself keeps equal in all processes.
        teacher_facts: tensors to be computed once of the frozen teacher and the training images,
            by name; a constructor may set them as its config demands. See :meth:`take_fact`.
        ce_loss_weight: weight of the cross-entropy that :meth:`forward_train` adds.
        label_smoothing: of that cross-entropy, in [0, 1).
        split: set by a trainer that wants `loss_tckd` and `loss_nckd` in place of `loss_kd`; of a
            class with :meth:`distill_split`.
        distills: False where the main stage is cross-entropy alone; the teacher then rests.
        init: plan of a stage of training before the main one (:meth:`init_stages`), if any.
        init_stage: name of that stage while it runs.
        frozen: what :meth:`run_teacher` runs in place of a teacher in eval mode, if set: it returns
            the same, sooner. It is no module, and in no state dict.
        watches_teacher: whether the method has put hooks on the teacher; the engine finds out.
    """

    uses_teacher = True
    teacher_in_eval_mode = True
    alone: str = ""
    takes_standardized_logits = False
    teacher_logits_only = False
    needs_teacher_classifier = True
    two_views = False
    soft_labels = False
    relates_images = False
    own_state: tuple[str, ...] = ()
    teacher_facts: Mapping[str, TeacherFact] = {}
    ce_loss_weight: float = 1.0
    label_smoothing: float = 0.0
    split: Split | None = None
    distills: bool = True
    init: InitPlan | None = None
    init_stage: str = ""
    frozen: Any = None
    watches_teacher: bool = False

    def __init__(self, student: nn.Module, teacher: nn.Module | None, cfg: Any = None):
        """Hold the two networks; `cfg` says whether logits are standardised.

        Only a class that `takes_standardized_logits` has to hand it on to here.
        """
        super().__init__()
        self.student = student
        self.teacher = teacher
        self.metrics: Losses = {}
        """Diagnostics of the last training forward: detached scalars, never part of the loss."""
        self._lskd = lskd_settings(cfg) if self.takes_standardized_logits else None

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if view_names(cls.forward_train):
            cls.two_views = True
        if "distill" in vars(cls):
            cls.teacher_logits_only = vars(cls).get("teacher_logits_only", False)
            if "distill_split" not in vars(cls):
                cls.distill_split = Distiller.distill_split  # type: ignore[method-assign]
        if vars(cls).keys() & _STEPS:
            own = vars(cls).get("needs_teacher_classifier", True)
            cls.needs_teacher_classifier = own

    @classmethod
    def can_do_without_teacher(cls) -> bool:
        """Whether `forward_train` takes `teacher_logits` in place of a pass of the teacher."""
        plain = all(getattr(cls, name) is getattr(Distiller, name) for name in _TEACHER_SEAMS)
        return cls.teacher_logits_only and plain

    @classmethod
    def build(
        cls,
        student: nn.Module,
        teacher: nn.Module | None,
        cfg: Any,
        num_data: int,
        image_size: tuple[int, int] | None = None,
        targets: Tensor | None = None,
    ) -> Distiller:
        """Construct from a config and facts of the training images, for constructors that ask.

        These are their number, (height, width) and classes (int64 [num_data]); None: unknown.
        """
        facts = {"num_data": num_data, "image_size": image_size, "targets": targets}
        wanted = inspect.signature(cls.__init__).parameters
        extra = {name: fact for name, fact in facts.items() if name in wanted}
        require_call(cls, (student, teacher, cfg), extra)
        try:
            return cls(student, teacher, cfg, **extra)
        except AttributeError as error:
            if " " not in str(error):  # yacs: nothing but the name of a key that is not there
                raise UserError(
                    f"{cls.__name__} reads the config key {error}, which is not set: give it in "
                    f"the config, or declare defaults (docs/method.md)"
                ) from error
            raise

    @property
    def module(self) -> Distiller:
        """This distiller: code written for a DataParallel-wrapped one says `distiller.module`."""
        return self

    def train(self, mode: bool = True) -> Distiller:
        """Set training mode; the teacher stays in eval mode (see `teacher_in_eval_mode`).

        In an initialisation stage, what it does not train is in eval mode.
        """
        if not isinstance(mode, bool):
            raise ValueError(f"train(mode) takes a bool, got {mode!r}")
        super().train(mode)
        if self.teacher is not None and self.teacher_in_eval_mode:
            self.teacher.eval()
        if self.frozen is not None:
            self.frozen.renew()
        if mode and self.init_stage:
            for child in self.children():
                child.eval()
            for module in self.init_stages()[self.init_stage].init_modules():
                module.train()
        return self

    def extra_parameters(self) -> list[nn.Parameter]:
        """Trainable parameters that the method adds to the two networks; no frozen ones."""
        networks = {id(p) for p in self.student.parameters()}
        if self.teacher is not None:
            networks |= {id(p) for p in self.teacher.parameters()}
        return [p for p in self.parameters() if p.requires_grad and id(p) not in networks]

    def get_learnable_parameters(self) -> list[nn.Parameter]:
        """The student's parameters, then the method's own, each in registration order."""
        return [*self.student.parameters(), *self.extra_parameters()]

    def param_groups(self) -> list[dict[str, Any]]:
        """Optimizer parameter groups; override to give parts their own `lr` or `weight_decay`.

        Classes of the original add their modules in `get_learnable_parameters` once more: a
        parameter that is listed twice counts once.
        """
        learnable = {id(p): p for p in self.get_learnable_parameters()}
        return [{"params": list(learnable.values())}]

    def get_extra_parameters(self) -> int:
        """Number of values the method adds to the student while training (0 at test time)."""
        return sum(p.numel() for p in self.extra_parameters())

    def distill(self, student: Output, teacher: Output, target: Tensor, **batch: Any) -> Tensor:
        """The method's weighted loss, a scalar.

        Args:
            student, teacher: outputs of the two networks on the same images; the teacher's carry
                no gradient. Their logits are standardised where the config says so.
            target: [N] class indices; with `soft_labels` perhaps probabilities, [N, C].
            batch: what else the trainer knows: `epoch` (from 1), `index` ([N] sample numbers), ...
        """
        raise UserError(
            f"{type(self).__name__} must override distill(student, teacher, target, **batch) "
            "or forward_train(image, target, **batch)"
        )

    def distill_split(
        self, student: Output, teacher: Output, target: Tensor, split: Split, **batch: Any
    ) -> tuple[Tensor, Tensor]:
        """:meth:`distill` as two weighted terms, of the target class and of the others."""
        raise TypeError(f"{type(self).__name__} must override distill_split(...)")

    @classmethod
    def can_split(cls) -> bool:
        """Whether its loss can be had as two terms."""
        plain = cls.forward_train is Distiller.forward_train
        return plain and cls.distill_split is not Distiller.distill_split

    def forward_train(self, image: Tensor, target: Tensor, **batch: Any) -> tuple[Tensor, Losses]:
        """Student logits and the terms of the objective, which the trainer sums.

        With `teacher_logits` in `batch`, [N, C], the teacher does not run.
        """
        known = batch.pop("teacher_logits", None)
        student, teacher = self.run_student(image), None
        if self.distills:
            teacher = self.run_teacher(image) if known is None else Output(known, {})
        with torch.autocast(image.device.type, enabled=False):
            losses = {
                "loss_ce": self.ce_loss_weight
                * cross_entropy(student.logits, target, self.label_smoothing)
            }
            if teacher is None:
                losses["loss_kd"] = student.logits.new_zeros(())
                return student.logits, losses
            outputs = self.standardized(student), self.standardized(teacher)
            if self.split is None:
                losses["loss_kd"] = loss_of(self, self.distill(*outputs, target, **batch))
            else:
                terms = self.distill_split(*outputs, target, self.split, **batch)
                losses["loss_tckd"], losses["loss_nckd"] = terms
        return student.logits, losses

    def standardize(self, logits: Tensor) -> Tensor:
        """Logits [N, C, ...] as the distillation loss is to see them; see `_standardize.py`."""
        return logits if self._lskd is None else standardize(logits, **self._lskd)

    def standardized(self, output: Output) -> Output:
        """`output` with logits as the distillation loss is to see them."""
        return Output(self.standardize(output.logits), output.features)

    def take_fact(self, name: str, value: Tensor) -> None:
        """Take one of `teacher_facts`, into the buffer of its name; called before training."""
        getattr(self, name).copy_(value)

    def init_stages(self) -> dict[str, Distiller]:
        """The stages to train before the main one, in order: name -> the method it is of."""
        return {"init": self} if self.init is not None and self.init.epochs else {}

    def init_modules(self) -> list[nn.Module]:
        """What the initialisation stage trains, and has in train mode; the rest stays as it is."""
        raise TypeError(f"{type(self).__name__} must override init_modules()")

    def init_param_groups(self) -> list[dict[str, Any]]:
        """Optimizer parameter groups of the initialisation stage: those of its modules."""
        return [{"params": [p for module in self.init_modules() for p in module.parameters()]}]

    def init_loss(self, student: Output, teacher: Output, target: Tensor, **batch: Any) -> Tensor:
        """What the initialisation stage minimises, a scalar; arguments as of :meth:`distill`."""
        raise TypeError(f"{type(self).__name__} must override init_loss(...) or forward_init(...)")

    def forward_init(self, image: Tensor, target: Tensor, **batch: Any) -> tuple[Tensor, Losses]:
        """Logits and loss terms of a step of the initialisation stage."""
        student, teacher = self.run_student(image), self.run_teacher(image)
        with torch.autocast(image.device.type, enabled=False):
            loss = self.init_loss(student, teacher, target, **batch)
            return student.logits, {"loss_init": loss_of(self, loss, "init_loss")}

    def run_student(self, image: Tensor) -> Output:
        """The student's output, with gradient."""
        logits, features = self.student(image)
        return Output(full_precision(logits), features)

    @torch.no_grad()
    def run_teacher(self, image: Tensor) -> Output:
        """The teacher's output, without gradient."""
        if self.teacher is None:
            raise TypeError(f"{type(self).__name__} has no teacher to run")
        rests = self.frozen is not None and not self.teacher.training
        logits, features = (self.frozen if rests else self.teacher)(image)
        return Output(full_precision(logits), features)

    def forward_test(self, image: Tensor) -> Tensor:
        """Logits at test time."""
        return self.student(image)[0]

    def forward(self, **kwargs: Any) -> Any:
        """:meth:`forward_train` in training mode, else :meth:`forward_test` on `image`.

        In training, an `image` that is a pair is handed on under the two names that `forward_train`
        gives its views, by default `image_weak` and `image_strong`. A `forward_train` without
        `**batch` gets the arguments it names. In an initialisation stage it is the
        :meth:`forward_init` of the stage's method.
        """
        if not self.training:
            return self.forward_test(kwargs["image"])
        if isinstance(kwargs.get("image"), (list, tuple)):
            names = view_names(self.forward_train) or ("image_weak", "image_strong")
            kwargs |= dict(zip(names, kwargs.pop("image"), strict=True))
        if self.init_stage:
            return self.init_stages()[self.init_stage].forward_init(**kwargs)
        if self._accepted is not None:
            kwargs = {name: value for name, value in kwargs.items() if name in self._accepted}
        if not self._required <= kwargs.keys():
            raise UserError(
                f"{type(self).__name__}.forward_train needs "
                f"{', '.join(sorted(self._required - kwargs.keys()))}, but the trainer gives it "
                f"{', '.join(kwargs)}: set SOLVER.TRAINER to one that belongs to this method"
            )
        return self.forward_train(**kwargs)

    @functools.cached_property
    def _accepted(self) -> set[str] | None:
        """Names of the arguments of `forward_train`; None if it takes any."""
        parameters = inspect.signature(self.forward_train).parameters
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return None
        return set(parameters)

    @functools.cached_property
    def _required(self) -> set[str]:
        """Names of the arguments of `forward_train` that have no default."""
        parameters = inspect.signature(self.forward_train).parameters.values()
        variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        return {p.name for p in parameters if p.default is p.empty and p.kind not in variable}


def view_names(forward_train: Callable[..., Any]) -> tuple[str, str] | None:
    """The arguments of a `forward_train` that take the weak and the strong view; None: no views.

    They are its two arguments that begin with `image_` (or `image` and one such), in order; a
    name such as `image_s` or `image_strong` before one such as `image_w` is the strong one.
    """
    names = [name for name in inspect.signature(forward_train).parameters if name != "image_size"]
    views = [name for name in names if name.startswith("image_")]
    if len(views) == 1 and "image" in names:
        views.insert(0, "image")
    if len(views) != 2:
        return None
    first, second = views
    swapped = first.startswith("image_s") and second.startswith(("image_w", "image_o"))
    return (second, first) if swapped else (first, second)


@DISTILLERS.register("NONE")
class Vanilla(Distiller):
    """Plain training of a network by cross-entropy, without a teacher."""

    uses_teacher = False
    soft_labels = True

    def __init__(self, student: nn.Module):
        super().__init__(student, None)

    @classmethod
    def build(
        cls, student: nn.Module, teacher: nn.Module | None, cfg: Any, *facts: Any, **more: Any
    ) -> Distiller:
        require_call(cls, (student,), {})
        return cls(student)

    def forward_train(self, image: Tensor, target: Tensor, **batch: Any) -> tuple[Tensor, Losses]:
        student = self.run_student(image)
        with torch.autocast(image.device.type, enabled=False):
            return student.logits, {"loss_ce": cross_entropy(student.logits, target)}


def adopt(module: ModuleType) -> None:
    """Register the Distiller subclasses of a module that registers none itself, by class name.

    Such classes come from files written for the original library, where a table elsewhere listed
    them. A class attribute `config` gives the defaults of their node; without it the node takes
    any key.
    """
    own = [
        item
        for item in vars(module).values()
        if isinstance(item, type)
        and issubclass(item, Distiller)
        and item.__module__ == module.__name__
    ]
    if not any(cls in DISTILLERS.values() for cls in own):
        for cls in own:
            DISTILLERS.add(cls.__name__, cls, config=vars(cls).get("config"))
