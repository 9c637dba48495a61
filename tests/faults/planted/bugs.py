"""The bugs that `planted.py` puts into the package: each a mistake that somebody could make."""

from __future__ import annotations

from typing import NamedTuple


class Bug(NamedTuple):
    """One edit.

    Attributes:
        name: what is wrong then.
        file: below mdistiller/.
        old, new: text that the file has once, and what takes its place.
        test: below tests/, as pytest takes it: a file, or FILE::FUNCTION; one of it has to fail.
    """

    name: str
    file: str
    old: str
    new: str
    test: str


LOGITS = "distillers/test_KD_DKD.py"

BUGS = (
    # losses
    Bug(
        "KD has T in place of T squared",
        "distillers/helpers/losses/logit_losses.py",
        "(temperature**2 / len(log_p))",
        "(temperature / len(log_p))",
        LOGITS,
    ),
    Bug(
        "KD is the mean over samples and classes",
        "distillers/helpers/losses/logit_losses.py",
        "(temperature**2 / len(log_p))",
        "(temperature**2 / log_p.numel())",
        LOGITS,
    ),
    Bug(
        "KL has the wrong sign",
        "distillers/helpers/losses/numerics.py",
        "return (log_q.exp() * (log_q - log_p)).sum(dim=dim)",
        "return (log_q.exp() * (log_p - log_q)).sum(dim=dim)",
        LOGITS,
    ),
    Bug(
        "cross-entropy divides by unlabelled samples as well",
        "distillers/helpers/losses/numerics.py",
        "labelled = len(target) if soft else (target != IGNORE_INDEX).sum().clamp(min=1)",
        "labelled = len(target)",
        "distillers/test_distillers.py"
        "::test_cross_entropy_without_labels_is_zero_and_takes_soft_targets",
    ),
    Bug(
        "DKD leaves the target among the other classes",
        "distillers/helpers/losses/decoupled.py",
        'rest = logits.scatter(1, column, float("-inf"))',
        "rest = logits.clone()",
        LOGITS,
    ),
    Bug(
        "DKD marks the target of the wrong sample",
        "distillers/helpers/losses/decoupled.py",
        "return target.clamp(min=0)[:, None], target != IGNORE_INDEX",
        "return target.flip(0).clamp(min=0)[:, None], target != IGNORE_INDEX",
        LOGITS,
    ),
    Bug(
        "DKD has ALPHA and BETA exchanged",
        "distillers/helpers/losses/logit_losses.py",
        "return alpha * tckd + beta * nckd",
        "return beta * tckd + alpha * nckd",
        LOGITS,
    ),
    Bug(
        "LSKD divides by C, not by C - 1",
        "distillers/helpers/losses/standardize.py",
        "logits.shape[1] - int(unbiased)",
        "logits.shape[1]",
        "distillers/test_standardize.py::test_values_by_hand",
    ),
    Bug(
        "CTKD lowers the loss by its temperature",
        "distillers/CTKD.py",
        "return -(1 - math.cos(math.pi * min(epoch, loops) / loops)) / 2",
        "return (1 - math.cos(math.pi * min(epoch, loops) / loops)) / 2",
        "distillers/test_ctkd.py::test_reversal_grows_to_its_full_size_and_stays",
    ),
    Bug(
        "CTKD trains the networks through the temperature's inputs",
        "distillers/CTKD.py",
        "logits = [z.detach().clamp(-1e4, 1e4) for z in (teacher, student)]",
        "logits = [z.clamp(-1e4, 1e4) for z in (teacher, student)]",
        "distillers/test_ctkd.py::test_the_networks_get_no_gradient_through_the_instance_temperature",
    ),
    Bug(
        "AT's maps are normalised over the batch",
        "distillers/AT.py",
        "return unit(powers.mean(dim=1).flatten(1))",
        "return unit(powers.mean(dim=1).flatten(1), dim=0)",
        "distillers/test_feature_losses.py",
    ),
    Bug(
        "ReviewKD's pyramid has the wrong weights",
        "distillers/helpers/losses/map_losses.py",
        "weight /= 2",
        "weight /= 4",
        "distillers/test_connector_losses.py",
    ),
    Bug(
        "ReviewKD's outputs are in the wrong order",
        "distillers/helpers/losses/map_losses.py",
        "return outputs[::-1]",
        "return outputs",
        "distillers/test_connector_losses.py",
    ),
    Bug(
        "OFD's stages have their weights in reverse",
        "distillers/OFD.py",
        "* 0.5 ** (self.depth - 1 - i)",
        "* 0.5**i",
        "distillers/test_published_weights.py::test_the_default_terms_are_the_published_weights_times_the_loss",
    ),
    Bug(
        "CRD's bank is not updated",
        "distillers/helpers/training/memory_bank.py",
        "memory[index] = unit(torch.lerp(rows, memory[index], momentum))",
        "memory[index].copy_(unit(torch.lerp(rows, memory[index], momentum)))",
        "distillers/test_crd.py::test_two_steps_equal_the_original",
    ),
    Bug(
        "CRD's bank has its momentum exchanged",
        "distillers/helpers/training/memory_bank.py",
        "torch.lerp(rows, memory[index], momentum)",
        "torch.lerp(memory[index], rows, momentum)",
        "distillers/test_crd.py::test_the_bank_keeps_its_momentum_of_what_it_held",
    ),
    Bug(
        "gathered batches lose the scale of their gradient",
        "distillers/helpers/training/gather.py",
        "return grads[0][ctx.share] * ctx.scale, None",
        "return grads[0][ctx.share], None",
        "distillers/test_relations.py::test_two_processes_equal_one_on_an_uneven_batch",
    ),
    # the step of a method
    Bug(
        "the teacher's batch norms are in train mode",
        "distillers/_base.py",
        "            self.teacher.eval()\n",
        "            self.teacher.train()\n",
        "distillers/test_distillers.py::test_train_keeps_the_teacher_in_eval_mode_and_wants_a_bool",
    ),
    Bug(
        "the teacher's outputs carry a gradient",
        "distillers/_base.py",
        "    @torch.no_grad()\n    def run_teacher",
        "    def run_teacher",
        "distillers/test_distillers.py::test_the_distillation_term_alone_reaches_the_students_stem_and_not_the_teacher",
    ),
    Bug(
        "warm-up begins an epoch late",
        "distillers/helpers/training/settings.py",
        "return min(epoch / warmup, 1.0) if warmup > 0 else 1.0",
        "return min((epoch - 1) / warmup, 1.0) if warmup > 0 else 1.0",
        "distillers/test_distillers.py::test_warm_up_of_nothing_is_full_weight",
    ),
    # networks
    Bug(
        "a file's moving average is passed over",
        "layouts.py",
        "for preferred in (list(states), [] if ours else averages, usual):",
        "for preferred in (list(states), usual):",
        "files/test_layouts.py::test_read",
    ),
    # data
    Bug(
        "the order of the images does not depend on the epoch",
        "dataset/memory/loader.py",
        "SeedSequence([self.seed % 2**64, epoch])",
        "SeedSequence([self.seed % 2**64, 0])",
        "dataset/memory/test_loader.py::test_other_epochs_and_seeds_give_other_orders_and_views",
    ),
    Bug(
        "images are shifted by the mean in units of 1, not of std",
        "dataset/memory/loader.py",
        "shift = [-m / s for m, s in zip(mean, std, strict=True)]",
        "shift = [-m for m, s in zip(mean, std, strict=True)]",
        "dataset/memory/test_augment.py::test_crop_flip_and_normalise_equal_torchvision",
    ),
    Bug(
        "views of mirrored images have the code of the others",
        "dataset/memory/augment.py",
        "return 2 * super().views(parameters) + parameters[:, 2]",
        "return 2 * super().views(parameters)",
        "dataset/memory/test_augment.py::test_equal_view_codes_mean_equal_pixels_and_others_differ",
    ),
    Bug(
        "held-out images are trained on as well",
        "dataset/split.py",
        "return (~held).nonzero().squeeze(1), held.nonzero().squeeze(1)",
        "return torch.arange(len(targets)), held.nonzero().squeeze(1)",
        "dataset/test_load_data.py::test_held_out_images_are_stratified_and_disjoint",
    ),
    Bug(
        "mixup leaves the labels as they are",
        "dataset/mixup.py",
        "return _blend(images, weight), _blend(labels, weight)",
        "return _blend(images, weight), labels",
        "dataset/test_mix.py::test_mixup_by_hand",
    ),
    Bug(
        "CutMix has the labels' weights exchanged",
        "dataset/mixup.py",
        "return patched, _blend(labels, 1.0 - area)",
        "return patched, _blend(labels, area)",
        "dataset/test_mix.py::test_cutmix_by_hand",
    ),
    Bug(
        "classes get the numbers of the folders' order",
        "dataset/classes.py",
        "for number, name in enumerate(names)}",
        "for number, name in enumerate(have)}",
        "networks/test_class_order.py::test_classes_are_numbered_as_the_key_says",
    ),
    Bug(
        "accumulated gradients are not divided",
        "dataset/sampler.py",
        "size = self.batch(end)[1] - self.batch(begin)[0]",
        "size = self.batch(step)[1] - self.batch(step)[0]",
        "engine/test_accumulation.py::test_weights_of_a_group_add_up_to_the_mean_over_its_samples",
    ),
    # training
    Bug(
        "the rate falls an epoch early",
        "engine/optim/schedules.py",
        "(stage - solver.WARMUP_EPOCHS) * per_epoch for stage",
        "(stage - solver.WARMUP_EPOCHS - 1) * per_epoch for stage",
        "engine/optim/test_optim.py::test_schedules",
    ),
    Bug(
        "norms decay though they are not to",
        "engine/optim/__init__.py",
        '{**group, "params": narrow, "weight_decay": 0.0}',
        '{**group, "params": narrow}',
        "engine/optim/test_optim.py::test_norms_and_biases_decay_unless_told_otherwise",
    ),
    Bug(
        "DOT has its momenta exchanged",
        "engine/dot.py",
        "momentum_kd=solver.MOMENTUM + solver.DOT.DELTA",
        "momentum_kd=solver.MOMENTUM - solver.DOT.DELTA",
        "engine/test_dot.py::test_the_trainer_gives_each_loss_its_own_momentum",
    ),
    Bug(
        "EMA has its decay exchanged",
        "engine/callbacks/ema.py",
        "get_ema_multi_avg_fn(decay)",
        "get_ema_multi_avg_fn(1 - decay)",
        "engine/callbacks/test_ema.py::test_the_average_follows_every_step",
    ),
    Bug(
        "gradients are clipped before fp16's scale is taken off",
        "engine/optimization.py",
        "            self.scaler.unscale_(self.optimizer)\n",
        "",
        "engine/test_clipping.py",
    ),
    Bug(
        "a resumed epoch leaves out a batch",
        "engine/checkpoints/resume.py",
        'int(position["updates"]) * trainer.accumulate, batches)',
        'int(position["updates"]) * trainer.accumulate + 1, batches)',
        "engine/callbacks/test_preemption.py::test_a_signal_ends_a_run_that_goes_on_to_the_same_bits",
    ),
    Bug(
        "top-5 counts as top-1",
        "engine/metrics.py",
        "hits[:, :k].sum() for k in topk",
        "hits[:, :1].sum() for k in topk",
        "engine/test_utils.py::test_accuracy_in_percent",
    ),
    Bug(
        "validation averages batches, not images",
        "engine/utils.py",
        "totals[3] += len(target)",
        "totals[3] += 1",
        "engine/test_utils.py::test_validate_weighs_samples_not_batches",
    ),
    Bug(
        "meters forget the size of a batch",
        "engine/metrics.py",
        "self[name].update(value, step.batch_size)",
        "self[name].update(value)",
        "engine/test_utils.py::test_meters_wait_and_give_the_same_means",
    ),
    # detection
    Bug(
        "the box loss is the mean over the objects",
        "detection/networks/roi.py",
        'beta=beta, reduction="sum") / max(len(labels), 1)',
        'beta=beta, reduction="sum") / objects.sum().clamp(min=1)',
        "detection/networks/test_detection_models.py"
        "::test_the_box_loss_is_torchvisions_and_bears_infinite_targets_of_the_background",
    ),
    Bug(
        "DKD on regions has the weights of classification",
        "detection/methods.py",
        '"ALPHA": 1.0, "BETA": 0.25,',
        '"ALPHA": 1.0, "BETA": 8.0,',
        "detection/test_losses.py::test_dkd_has_the_original_weights",
    ),
    Bug(
        "a resumed detection run forgets the images that wait for their orientation",
        "detection/sampler.py",
        'self.waiting = [[(a, b) for a, b in group] for group in state["waiting"]]',
        "self.waiting = [[], []]",
        "detection/test_batches.py::test_what_follows_a_state_is_the_same_again",
    ),
    Bug(
        "a detector's rate is that of the next iteration",
        "detection/trainer.py",
        "if self.begins_step and self.global_step > 1:",
        "if self.begins_step:",
        "detection/test_trainer.py::test_micro_batches_share_a_step_and_its_rate",
    ),
    Bug(
        "detections have the lower right corner in place of the size",
        "detection/coco/evaluate.py",
        "corners[:, 2:] - corners[:, :2]",
        "corners[:, 2:]",
        "detection/coco/test_evaluate.py::test_the_truth_itself_is_all_right",
    ),
    # several runs
    Bug(
        "all trials of a sweep have the same seed",
        "sweep/plan.py",
        "= seed, str(self.out), name",
        "= 0, str(self.out), name",
        "sweep/test_plan.py::test_a_grid_is_variants_times_axes_times_seeds",
    ),
    Bug(
        "a sweep's deviation is that of the population",
        "sweep/table.py",
        "± {statistics.stdev(values):.2f}",
        "± {statistics.pstdev(values):.2f}",
        "sweep/test_table.py::test_the_table_is_mean_and_sample_deviation_over_seeds",
    ),
    Bug(
        "crashes count though the trial went on by an epoch",
        "sweep/trial_state.py",
        "crashes += crashed and not attempt.intermediate_values",
        "crashes += crashed",
        "sweep/test_claims.py::test_a_trial_that_keeps_killing_its_process_has_failed",
    ),
    Bug(
        "of runs in lock-step, the one in front goes on",
        "run/together.py",
        "min(self._waiting, key=",
        "max(self._waiting, key=",
        "run/test_together.py::test_every_run_is_as_alone_and_the_teacher_runs_once",
    ),
    Bug(
        "runs in lock-step draw from one another's random numbers",
        "run/together.py",
        "        add_waited(time.perf_counter() - began)\n        ambient.restore()\n",
        "        add_waited(time.perf_counter() - began)\n",
        "run/test_together.py::test_every_run_is_as_alone_and_the_teacher_runs_once",
    ),
    Bug(
        "a run in lock-step counts the time of the others as its own",
        "run/together.py",
        "add_waited(time.perf_counter() - began)",
        "add_waited(0.0)",
        "run/test_together.py",
    ),
    # what is built on training
    Bug(
        "the interval divides by n",
        "report/numbers.py",
        "error = statistics.stdev(values) / math.sqrt(n)",
        "error = statistics.pstdev(values) / math.sqrt(n)",
        "report/test_groups.py::test_the_interval_is_scipys_and_the_hand_computed_one",
    ),
    Bug(
        "Holm's method does not step down",
        "report/numbers.py",
        "(len(ps) - rank) * ps[index]",
        "len(ps) * ps[index]",
        "report/test_groups.py::test_several_tests_are_judged_together",
    ),
    Bug(
        "calibration errors of several bins cancel",
        "evaluation/predictions.py",
        "gaps = (self.bins[:, 0] - self.bins[:, 1]).abs().sum()",
        "gaps = (self.bins[:, 0] - self.bins[:, 1]).sum().abs()",
        "evaluation/test_analysis.py::test_quality_agrees_with_torchmetrics",
    ),
    Bug(
        "KL of the comparison is the student's",
        "evaluation/predictions.py",
        "divergence(theirs.log_softmax(dim=1), ours.log_softmax(dim=1))",
        "divergence(ours.log_softmax(dim=1), theirs.log_softmax(dim=1))",
        "evaluation/test_analysis.py::test_a_copy_agrees_in_all_and_kl_is_of_the_teacher",
    ),
    Bug(
        "CKA counts the diagonals",
        "evaluation/features.py",
        "same = cross.square().sum() - w",
        "same = cross.square().sum()",
        "evaluation/test_analysis.py::test_cka_equals_its_form_in_gram_matrices",
    ),
    Bug(
        "an exported network multiplies by the deviation",
        "export/student.py",
        "image = (image - self.mean) / self.std",
        "image = (image - self.mean) * self.std",
        "export/test_export.py::test_a_student_with_its_own_normalisation_is_exported_with_it",
    ),
    Bug(
        "an export that disagrees with the network is written",
        "export/write.py",
        "if not difference <= TOLERANCE * max(",
        "if not difference <= 1e3 * max(",
        "export/test_export.py::test_a_wrong_file_is_not_written",
    ),
    Bug(
        "a wrong hash passes",
        "files/hashes.py",
        "if not got.startswith(want.lower()):",
        "if got.startswith(want.lower()[:0] + '!'):",
        "files/test_fetch.py::test_a_wrong_hash_or_size_leaves_nothing",
    ),
)
