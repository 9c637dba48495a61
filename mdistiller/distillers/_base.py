"""Distiller, the base class of every method, and Vanilla, training without a teacher."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mdistiller.distillers.helpers.features.output import Losses, Output
from mdistiller.distillers.helpers.features.shapes import Size
from mdistiller.distillers.helpers.losses.numerics import cross_entropy, full_precision
from mdistiller.distillers.helpers.losses.split import Split
from mdistiller.distillers.helpers.losses.standardize import lskd_settings, standardize
from mdistiller.distillers.helpers.training.arguments import (
    StepArguments,
    missing_arguments,
    view_names,
)
from mdistiller.distillers.helpers.training.checks import (
    logits_and_features,
    loss_of,
    require_call,
    teacher_view,
)
from mdistiller.distillers.helpers.training.teacher_facts import TeacherFact
from mdistiller.distillers.helpers.training.trainable import Trainable
from mdistiller.registry import Registry, UserError

__all__ = ["DISTILLERS", "Distiller", "Losses", "Output", "Vanilla"]

_CORRECTED = "CORRECTEDKD, and CORRECTEDKD.MODE"
OPTIONS_HERE = {
    "ABKD": "KD, DKD or TTM, and its DIVERGENCE ab(ALPHA, BETA)",
    "LSKD": "KD or another method of logits, and LSKD.ENABLE True",
    "DEEPKD": "KD, DKD, MLKD or CRLD, and SOLVER.TRAINER deepkd",
    "DOT": "a method, and SOLVER.TRAINER dot",
    **dict.fromkeys(("SWAP", "LA"), f"{_CORRECTED} swap"),
    "SOFT_SWAP": f"{_CORRECTED} soft_swap",
    "RC": f"{_CORRECTED} rc",
    **dict.fromkeys(("REVISION", "LR"), f"{_CORRECTED} revision"),
}
"""Methods of other projects that are settings of a method or of the solver here."""
DISTILLERS = Registry("distiller (DISTILLER.TYPE)", OPTIONS_HERE)
_TEACHER_SEAMS = ("run_teacher", "forward_train", "forward")
_STEPS = {"distill", "forward_train", "forward", "init_loss", "forward_init"}


class Distiller(Trainable):
    """A student and a teacher as one module; the base class of every method.

    Most methods override :meth:`distill`. A method with several views, without cross-entropy or
    with another head overrides :meth:`forward_train`, and :meth:`forward_test` if it predicts
    differently. Modules, parameters and buffers that a method registers are trained, moved and
    saved like those of any `nn.Module`.

    Class attributes:
        uses_teacher: False for methods without a teacher; they are built with None.
        trains_peers: True for methods that train networks beside the student (DISTILLER.PEERS); the
            constructor gets them as `peers`, and :meth:`students` lists all.
        teacher_in_eval_mode: False to run the teacher in train mode: it normalises by batch
            statistics, and its running statistics change.
        alone: reason why the method cannot be part of a sum such as "KD+AT" ("it ..."), or "".
        takes_standardized_logits: True if :meth:`distill` can work on standardised logits; it gets
            them if the config enables LSKD.
        teacher_logits_only: True if the training step reads only the teacher's logits. Cached
            logits can then replace the teacher's forward pass, unless the class overrides
            `forward_train`, `run_teacher` or `forward`. A class that overrides `distill` does not
            inherit True.
        teacher_summary_only: the same for the teacher's summary vector, `pooled_feat`.
        needs_teacher_classifier: False if the loss depends on neither the teacher's logits nor its
            classifier: the teacher may have other classes, and its checkpoint may lack the
            classifier. A class that overrides a training step does not inherit False.
        needs_labels: False if the loss reads neither labels nor logits: the method can train on
            data without classes, where :meth:`forward_train` adds no cross-entropy. A class that
            overrides a training step does not inherit False.
        two_views: True for methods that train on two independently augmented views of an image:
            the loader gives pairs (weak, strong), passed to :meth:`forward_train` as `image_weak`
            and `image_strong`. Set automatically if `forward_train` has two arguments that begin
            with `image_`; they get the views (:func:`view_names`).
        soft_labels: True if the method works on mixed images: `target` may be [N, C] class
            probabilities, and `index` is the number of one of the two images.
        relates_images: True if the maps of one image are compared with those of the others.
        own_state: prefixes of buffers that the method itself keeps equal in all processes.
        teacher_facts: tensors to compute once from the frozen teacher and the training images, by
            name; a constructor may set them. See :meth:`take_fact`.
        ce_loss_weight: weight of the cross-entropy that :meth:`forward_train` adds.
        label_smoothing: label smoothing of that cross-entropy, in [0, 1); SOLVER.LABEL_SMOOTHING
            above 0 replaces it.
        ce_class_weights: weights of the classes in that cross-entropy, [C]; None: all 1. The engine
            sets them by DISTILLER.CLASS_WEIGHTS.
        uses_hard_label_loss: whether training reads the last two, by calling
            :meth:`hard_label_loss`. A class that overrides `forward_train` does not inherit True.
        split: set by a trainer that needs `loss_tckd` and `loss_nckd` instead of `loss_kd`;
            requires :meth:`distill_split`.
        distills: False if the main stage is cross-entropy alone; the teacher does not run.
        frozen: a faster equivalent of a teacher in eval mode, run in its place if set; not a
            submodule, so not in the state dict.
        fixed_norms: modules that stay in eval mode while training (SOLVER.FREEZE).
        teacher_sees_weak: True to run the teacher on an image's attribute `teacher_view`
            (DISTILLER.TEACHER_AUGMENT); the engine sets it.
        watches_teacher: True if the method has registered hooks on the teacher; the engine sets it.
    """

    uses_teacher = True
    trains_peers = False
    teacher_in_eval_mode = True
    alone: str = ""
    takes_standardized_logits = False
    teacher_logits_only = False
    teacher_summary_only = False
    needs_teacher_classifier = True
    needs_labels = True
    two_views = False
    soft_labels = False
    relates_images = False
    own_state: tuple[str, ...] = ()
    teacher_facts: Mapping[str, TeacherFact] = {}
    ce_loss_weight: float = 1.0
    label_smoothing: float = 0.0
    ce_class_weights: Tensor | None
    uses_hard_label_loss = True
    split: Split | None = None
    distills: bool = True
    frozen: Any = None
    teacher_sees_weak: bool = False
    watches_teacher: bool = False
    fixed_norms: Sequence[nn.Module] = ()

    def __init__(self, student: nn.Module, teacher: nn.Module | None, cfg: Any = None):
        """Register the two networks.

        Args:
            cfg: the config, which enables LSKD; read only if `takes_standardized_logits`.
        """
        super().__init__()
        self.student = student
        self.teacher = teacher
        self.register_buffer("ce_class_weights", None, persistent=False)
        self.metrics: Losses = {}
        """Diagnostics of the last training forward: detached scalars, never part of the loss."""
        self._lskd = lskd_settings(cfg) if self.takes_standardized_logits else None

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if view_names(cls.forward_train):
            cls.two_views = True
        if {"forward_train", "forward"} & vars(cls).keys():
            cls.uses_hard_label_loss = vars(cls).get("uses_hard_label_loss", False)
        if "distill" in vars(cls):
            for name in ("teacher_logits_only", "teacher_summary_only"):
                setattr(cls, name, vars(cls).get(name, False))
            for name in ("distill_split", "distill_rows"):
                if name not in vars(cls):
                    setattr(cls, name, getattr(Distiller, name))
        if vars(cls).keys() & _STEPS:
            cls.needs_teacher_classifier = vars(cls).get("needs_teacher_classifier", True)
            cls.needs_labels = vars(cls).get("needs_labels", True)

    @classmethod
    def cacheable_outputs(cls) -> tuple[str, ...]:
        """What of "logits" and "pooled_feat" can replace the teacher's forward pass if cached.

        Empty if the step may read other outputs.
        """
        if not cls.runs_teacher_once():
            return ()
        return ("logits",) * cls.teacher_logits_only + ("pooled_feat",) * cls.teacher_summary_only

    @classmethod
    def runs_teacher_once(cls) -> bool:
        """Whether the teacher runs once a step, by the code of this class."""
        return all(getattr(cls, name) is getattr(Distiller, name) for name in _TEACHER_SEAMS)

    @classmethod
    def build(
        cls,
        student: nn.Module,
        teacher: nn.Module | None,
        cfg: Any,
        num_data: int,
        image_size: Size = None,
        targets: Tensor | None = None,
        peers: Sequence[nn.Module] = (),
    ) -> Distiller:
        """Construct the method; its constructor gets those of the last four that it names.

        Args:
            num_data: number of training images.
            image_size: their (height, width); None: unknown.
            targets: their classes, int64 [num_data]; None: unknown.
            peers: networks to be trained beside the student.

        Raises:
            UserError: the constructor takes other arguments, or reads a key that is not set.
        """
        facts = {"num_data": num_data, "image_size": image_size, "targets": targets, "peers": peers}
        wanted = inspect.signature(cls.__init__).parameters
        extra = {name: fact for name, fact in facts.items() if name in wanted}
        require_call(cls, (student, teacher, cfg), extra)
        try:
            return cls(student, teacher, cfg, **extra)
        except AttributeError as error:
            if " " not in str(error):  # yacs names the missing key and nothing else
                raise UserError(
                    f"{cls.__name__} reads the config key {error}, which is not set: give it in "
                    f"the config, or declare defaults (docs/extend/method.md)"
                ) from error
            raise

    @property
    def module(self) -> Distiller:
        """This distiller, for code that expects a DataParallel wrapper (`distiller.module`)."""
        return self

    def train(self, mode: bool = True) -> Distiller:
        """Set training mode; the teacher stays in eval mode if `teacher_in_eval_mode`.

        In an initialisation stage, the modules that it does not train stay in eval mode.
        """
        if not isinstance(mode, bool):
            raise ValueError(f"train(mode) takes a bool, got {mode!r}")
        super().train(mode)
        if self.teacher is not None and self.teacher_in_eval_mode:
            self.teacher.eval()
        if self.frozen is not None:
            self.frozen.refresh()
        if mode and self.init_stage:
            for child in self.children():
                child.eval()
            for module in self.init_stages()[self.init_stage].init_modules():
                module.train()
        for norm in self.fixed_norms:
            norm.eval()
        return self

    def distill(self, student: Output, teacher: Output, target: Tensor, **batch: Any) -> Tensor:
        """The method's weighted loss, a scalar.

        Args:
            student, teacher: outputs of the two networks on the same images; the teacher's have
                no gradient. Their logits are standardised if the config enables LSKD.
            target: [N] class indices; with `soft_labels` also [N, C] probabilities.
            batch: the rest of the batch: `epoch` (from 1), `index` ([N] sample numbers), ...
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

    def distill_rows(
        self, student: Output, teacher: Output, target: Tensor, **batch: Any
    ) -> Tensor:
        """The loss of each sample, [N], whose mean is :meth:`distill`; for teachers that are
        weighted sample by sample (DISTILLER.COMBINE confidence)."""
        raise TypeError(f"{type(self).__name__} must override distill_rows(...)")

    @classmethod
    def has_rows(cls) -> bool:
        """Whether :meth:`distill_rows` is available."""
        return cls.distill_rows is not Distiller.distill_rows

    @classmethod
    def can_split(cls) -> bool:
        """Whether :meth:`distill_split` is available."""
        plain = cls.forward_train is Distiller.forward_train
        return plain and cls.distill_split is not Distiller.distill_split

    def forward_train(self, image: Tensor, target: Tensor, **batch: Any) -> tuple[Tensor, Losses]:
        """Student logits [N, C] and the loss terms, which the trainer sums.

        With `teacher_logits` [N, C] in `batch`, and `teacher_features` if the method reads them,
        the teacher does not run.
        """
        cached, features = batch.pop("teacher_logits", None), batch.pop("teacher_features", {})
        student, teacher = self.run_student(image), None
        if self.distills:
            teacher = self.run_teacher(image) if cached is None else Output(cached, features)
        with torch.autocast(image.device.type, enabled=False):
            losses: Losses = {}
            if student.logits.shape[1]:  # without labels there are no classes
                losses["loss_ce"] = self.ce_loss_weight * self.hard_label_loss(
                    student.logits, target
                )
            if teacher is None:
                losses["loss_kd"] = student.logits.new_zeros(())
                return student.logits, losses
            logits = student.logits
            if self._lskd is not None:
                student, teacher = self.standardized(student), self.standardized(teacher)
            if self.split is None:
                losses["loss_kd"] = loss_of(self, self.distill(student, teacher, target, **batch))
            else:
                terms = self.distill_split(student, teacher, target, self.split, **batch)
                losses["loss_tckd"], losses["loss_nckd"] = terms
        return logits, losses

    def hard_label_loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Mean cross-entropy, a scalar, with the run's label smoothing and class weights."""
        return cross_entropy(logits, target, self.label_smoothing, self.ce_class_weights)

    def standardize(self, logits: Tensor) -> Tensor:
        """Logits [N, C, ...] as the distillation loss reads them (LSKD)."""
        return logits if self._lskd is None else standardize(logits, **self._lskd)

    def standardized(self, output: Output) -> Output:
        """`output` with its logits standardised if the config enables LSKD."""
        return Output(self.standardize(output.logits), output.features)

    def students(self) -> list[nn.Module]:
        """The networks that are trained, evaluated and saved: the student, then its peers."""
        return [self.student]

    def take_fact(self, name: str, value: Tensor) -> None:
        """Store one of `teacher_facts` in the buffer of its name; called before training."""
        getattr(self, name).copy_(value)

    def forward_init(self, image: Tensor, target: Tensor, **batch: Any) -> tuple[Tensor, Losses]:
        """Logits and loss terms of a step of the initialisation stage."""
        student, teacher = self.run_student(image), self.run_teacher(image)
        with torch.autocast(image.device.type, enabled=False):
            loss = self.init_loss(student, teacher, target, **batch)
            return student.logits, {"loss_init": loss_of(self, loss, "init_loss")}

    def run_student(self, image: Tensor) -> Output:
        """The student's output, with gradient."""
        logits, features = logits_and_features(self.student(image), self.student)
        return Output(full_precision(logits), features)

    @torch.no_grad()
    def run_teacher(self, image: Tensor) -> Output:
        """The teacher's output, without gradient."""
        if self.teacher is None:
            raise TypeError(f"{type(self).__name__} has no teacher to run")
        if self.teacher_sees_weak:
            image = teacher_view(image, self)
        fast = self.frozen is not None and not self.teacher.training
        output = (self.frozen if fast else self.teacher)(image)
        logits, features = logits_and_features(output, self.teacher)
        return Output(full_precision(logits), features)

    def forward_test(self, image: Tensor) -> Tensor:
        """Logits at test time."""
        logits: Tensor = logits_and_features(self.student(image), self.student)[0]
        return logits

    def forward(self, **kwargs: Any) -> Any:
        """:meth:`forward_train` in training mode, else :meth:`forward_test` on `image`.

        In training, a pair of views in `image` is passed under the names that `forward_train` has
        for them, by default `image_weak` and `image_strong`; a `forward_train` without `**batch`
        gets the arguments it names. An initialisation stage runs :meth:`forward_init` instead.
        """
        if not self.training:
            return self.forward_test(kwargs["image"])
        arguments = self._step_arguments
        if isinstance(kwargs.get("image"), (list, tuple)):
            kwargs |= dict(zip(arguments.views, kwargs.pop("image"), strict=True))
        if self.init_stage:
            return self.init_stages()[self.init_stage].forward_init(**kwargs)
        if arguments.accepted is not None:
            kwargs = {name: value for name, value in kwargs.items() if name in arguments.accepted}
        if not arguments.required <= kwargs.keys():
            raise missing_arguments(self, arguments.required, kwargs)
        return self.forward_train(**kwargs)

    @functools.cached_property
    def _step_arguments(self) -> StepArguments:
        return StepArguments.of(self.forward_train)


@DISTILLERS.register("NONE")
class Vanilla(Distiller):
    """Plain training of a network by cross-entropy, without a teacher."""

    uses_teacher = False
    soft_labels = True
    uses_hard_label_loss = True

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
            return student.logits, {"loss_ce": self.hard_label_loss(student.logits, target)}
