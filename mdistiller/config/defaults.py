"""Defaults of what the engine reads; methods and data register theirs beside their own code."""

from __future__ import annotations

from typing import Any

from mdistiller.distillers.helpers.losses.standardize import LSKD_CONFIG

ENGINE_CONFIG: dict[str, Any] = {
    "EXPERIMENT": {
        "PROJECT": "distill",
        "NAME": "",  # of the run folder; empty: TAG; auto: method, networks and data
        "TAG": "default",  # default: as NAME auto
        "SEED": 0,
        "LOGIT_STAND": False,  # LSKD.ENABLE by the name that forks use
    },
    "DISTILLER": {
        "TYPE": "NONE",  # a method, or several: "KD+AT"
        "CE_WEIGHT": 1.0,  # of the cross-entropy, where methods are combined
        # Of the classes in the cross-entropy with the labels: none, inverse (to their number of
        # training images), or a list; scaled to a mean of 1 over the training images.
        "CLASS_WEIGHTS": "none",
        "TEACHER": "ResNet50",
        "STUDENT": "resnet32",
        "TEACHER_ARGS": {},  # keyword arguments of the network's constructor, where it takes any
        "STUDENT_ARGS": {},
        "TEACHER_AUGMENT": "same",  # weak: its images without RANDAUGMENT and ERASING
        "TEACHER_SIZE": 0,  # side or [height, width] of the teacher's images; 0: the student's
        # Normalisation of the images that a network sees: data (the data set's), own (that of its
        # released weights), auto (own if it starts from those, else data) or [[mean], [std]].
        "TEACHER_NORM": "auto",
        "STUDENT_NORM": "auto",
        "CHECK_CLASSES": True,  # class names in a file of weights must be those of the data
        "STUDENT_CKPT": "",  # a file that the student starts from; what does not fit stays random
        "TEACHER_CKPT": "",  # a file; empty: the zoo's own place, else TEACHER_CFG
        "TEACHER_CFG": "",  # a config that trains the teacher first
        "TEACHERS": [],  # several, in the place of TEACHER (docs/teachers.md)
        "COMBINE": "losses",  # of TEACHERS: losses, ensemble or confidence
        "PEERS": [],  # networks that DML and KDCL train beside the student; one like it by default
        "TEACHER_FOLD": True,  # run a frozen teacher folded and in channels_last: the same, faster
        "TEACHER_DTYPE": "auto",  # of a frozen teacher: fp32, bf16, fp16, or auto: as SOLVER.AMP
        "TEACHER_CACHE": "none",  # remember a frozen teacher's outputs: none, memory or disk
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
        "SCHEDULE": "multistep",  # multistep, cosine, plateau, constant, or one of yours
        "SCHEDULE_BY": "epoch",  # or step: the rate changes after each optimizer step
        "LR_DECAY_STAGES": [150, 180, 210],
        "LR_DECAY_RATE": 0.1,
        "PATIENCE": 10,  # plateau: epochs without a lower training loss that are put up with
        "WARMUP_EPOCHS": 0,  # epochs of linear warm-up of the learning rate
        "MIN_LR": 0.0,  # where the cosine ends
        "WEIGHT_DECAY": 0.0001,
        "NORM_DECAY": True,  # weight decay on biases and norms, too
        "MOMENTUM": 0.9,
        "NESTEROV": False,
        "LABEL_SMOOTHING": 0.0,  # of the cross-entropy with the labels; 0: the method's own
        "TYPE": "SGD",  # SGD, Adam, AdamW, one of timm's (lion, lamb, muon, ...), or one of yours
        "OPTIMIZER_ARGS": {},  # further keyword arguments of the optimizer: {betas: [0.9, 0.98]}
        "CLIP_GRAD_NORM": 0.0,  # 0: no clipping
        "AMP": "none",  # none, bf16 or fp16
        "EMA": 0.0,  # decay a step of the student's moving average; 0: none is kept
        "QAT_EPOCHS": 0,  # last epochs in which the student computes as in 8 bits (export --int8)
        "FREEZE": [],  # parameters of the student that stay as they are: ["stem", "layer1.*"]
        "LR_BY_NAME": [],  # factors on LR for parameters of the student: ["layer1.*=0.1", "fc=10"]
        "LAYER_DECAY": 1.0,  # factor on LR from each layer of the student to the one below
        "SYNC_BN": False,  # several processes: batch norm by the statistics of all
        "COMPILE": False,  # torch.compile; True, or its mode
        "CUDA_GRAPHS": False,  # CUDA: record a step once an epoch and replay it
        "CHANNELS_LAST": False,  # images and convolutions in torch.channels_last memory format
        "DETERMINISTIC": False,  # CUDA: reproducible kernels, slower
        "FIND_UNUSED_PARAMETERS": False,  # several processes: a method leaves parameters unused
        "SKIP_NONFINITE": 0,  # steps of a run that a loss or gradient that is not finite may cost
        "RANK_TIMEOUT": 30.0,  # several processes: minutes to wait for another one in a step
        "DOT": {"DELTA": 0.075},
        "DEEPKD": {  # added to MOMENTUM for the gradients of the task, the target class, the others
            "DELTA_TOG": 0.075,
            "DELTA_TCG": -0.075,
            "DELTA_NCG": 0.075,
            "TOPK": 0,  # classes by the teacher's rank in the third; 0: all
            "FORM": "coded",  # or written: where the authors' code and paper part
        },
    },
    "LOG": {
        "SELECT_BY": "top1",  # the best epoch: top1, balanced_accuracy, macro_f1 or loss
        "TENSORBOARD_FREQ": 500,  # training steps between points of the step curves
        "SAVE_CHECKPOINT_FREQ": 40,  # epochs between the numbered checkpoints
        "KEEP_CHECKPOINTS": 0,  # numbered checkpoints to keep, the newest; 0: all
        "SAVE_EVERY_MINUTES": 15.0,  # saves `latest` within epochs as well; 0: after epochs only
        "SAFETENSORS": False,  # students also in that format; needs the package
        "PREFIX": "./output",
        "WANDB": False,
        "PROBE": "",  # labelled images, a folder or a data set: k-NN accuracy in training
        "PROBE_FREQ": 10,  # epochs between these
        "MISTAKES": 0,  # worst mistakes of the last epoch that are drawn in TensorBoard; 0: none
    },
    "DEVICE": "auto",
    # User files or modules that register methods, models, data sets; forks with a slash behind
    # their folder. FORK: DIR adds one of the latter.
    "IMPORTS": [],
    "HOOKS": [],  # names of registered hooks, run in this order before those of every run
}
