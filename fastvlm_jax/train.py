"""Runs one training stage from top to bottom: mesh, stage, data, state, restore, loop. Read this file first."""

import contextlib
import math
import pathlib
from collections.abc import Callable, Collection
from functools import partial

import jax
import ml_collections

from fastvlm_jax import checkpoint, config_checks, distributed, optim, sharding
from fastvlm_jax import config as config_lib
from fastvlm_jax.changes import check_allowed
from fastvlm_jax.data.load.from_config import make_loader, open_sources
from fastvlm_jax.data.load.loader import Loader
from fastvlm_jax.data.sources import contents_of, fingerprint
from fastvlm_jax.distributed import Interrupted, StopRequest, Watchdog
from fastvlm_jax.evaluate.benchmark import Result
from fastvlm_jax.evaluate.samples import make_samples
from fastvlm_jax.evaluate.validation import Evaluate, make_evaluation
from fastvlm_jax.faults import BadSteps
from fastvlm_jax.metrics import opening, profiling, tracking
from fastvlm_jax.metrics.best import BestScore
from fastvlm_jax.metrics.rows import read_metrics
from fastvlm_jax.metrics.step_log import StepLog, StepRecord
from fastvlm_jax.metrics.writer import MetricsWriter
from fastvlm_jax.stage import make_mesh, make_step, open_stage
from fastvlm_jax.train_state import TrainState
from fastvlm_jax.workdir import check_processes, claim, make_lineage


def train(
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    devices=None,
    profile: str = "",
    allow_changes: Collection[str] = (),
) -> TrainState:
    """Trains the stage that `config` describes, from its parent's weights or from where `workdir` stopped.

    Args:
      devices: devices of the mesh; default: all.
      profile: steps to trace, "FIRST:LAST"; see metrics/profiling.py.
      allow_changes: keys of the config that may differ from those of the run in `workdir` though its results depend on
        them; see changes.py.

    Returns:
      The final state, which is also the last checkpoint of the workdir: of the last step or, with `stop_after`, of the
      evaluation that ended the run.

    Raises:
      ValueError, FileNotFoundError: settings, data, parent or workdir do not fit, or another run is at work in the
        workdir; nothing was written.
      FloatingPointError: the loss or the state is not finite, or bad steps do not end (see faults.py).
      OSError: a checkpoint could not be written, or another file; the message names it. Or the workdir has vanished, or
        another run has taken it.
      Interrupted: this process or another got SIGINT, SIGTERM or the platform's notice; the state is saved.
    """
    config_checks.validate(config)
    settings = config_lib.plain(config)
    check_allowed(allow_changes, settings)
    check_processes(settings)
    tracking.check(config.wandb)
    mesh = make_mesh(config, devices)
    sources = open_sources(config.data, "train")
    stage = open_stage(config)

    with jax.set_mesh(mesh), contextlib.ExitStack() as context:
        batches = sharding.batch_sharding(mesh)
        open_loader = partial(make_loader, config.data, stage.processor, "train", seed=config.seed, sharding=batches)
        loader = open_loader()
        steps = config.steps or math.ceil(config.epochs * loader.batches_per_epoch)
        step = make_step(config, stage.model, mesh, steps=steps, num_sources=len(sources))
        traced = profiling.parse_steps(profile, steps)
        evaluate = make_evaluation(config, stage.model, step.loss, stage.processor, batches)
        answer_samples = make_samples(config, stage.model, stage.processor, mesh)
        origin = make_lineage(settings, stage.parent_lineage, fingerprint(sources), contents_of(sources))
        claimed = context.enter_context(claim(workdir, settings, origin, stage.processor, allow_changes))
        name = config.stage or workdir.name
        watchdog = context.enter_context(Watchdog(workdir, name, steps))
        best = BestScore(config.keep_best, config.stop_after)
        bad_steps = BadSteps(config.bad_steps, workdir, name)
        latest, every = config.keep_checkpoints, config.keep_every
        retention = checkpoint.Retention(latest, every, lambda: best.step, lambda: bad_steps.unsettled)
        checkpointer = checkpoint.open_checkpointer(workdir, retention, stage.base)
        opening.tell_data(name, config, sum(map(len, sources)), loader.batches_per_epoch, steps)
        rng = jax.random.key(config.seed)
        step_fn = opening.telling_compilation(name, step.fn, watchdog.doing)
        stop = context.enter_context(StopRequest())

        def raise_failed() -> None:
            """Raises what has failed beside the loop: a save in the background, or the hold on the workdir."""
            checkpoint.raise_failed(checkpointer)
            claimed.check()

        def attempt() -> TrainState | None:
            """Runs from the latest checkpoint, or from the start, to the end; None if the run has to go back."""
            nonlocal loader
            if (row := bad_steps.first_of_row) is not None:
                watchdog.restart()
                checkpoint.set_back(checkpointer, row)
            if checkpointer.latest is None:
                opening.tell_model(name, config, step.abstract.params, stage.parent_variables)
                state, position, passed_over = step.make_state(rng, stage.parent_variables), 0, ()
            else:
                with watchdog.doing("the restore"):
                    state, position, passed_over = checkpoint.restore(checkpointer, step.abstract)
            state, passed_over = bad_steps.begin(state, position, passed_over, loader.build)
            if checkpointer.latest is not None:
                opening.tell(name, f"goes on behind step {int(state.step)} of {steps}")
            if position or passed_over:
                loader.close()
                loader = open_loader(start=position, passed_over=passed_over)
            start = int(state.step)
            if start > steps:
                raise ValueError(f"{workdir} is at step {start}, beyond the {steps} steps of this config: raise them")
            if row is None:
                rows, skipped = read_metrics(workdir), int(state.guard.skipped)
                opening.tell_changes(name, config, claimed.changes, rows, step.rates, start, steps, skipped)
            best.resume(workdir, start, checkpointer.steps)
            tracker = tracking.open_run(config.wandb, workdir, name, settings)
            writer = MetricsWriter(workdir, name, start, steps, tracker)
            trace = profiling.Trace(traced, workdir / "profile", start, steps)
            learning, devices = tuple(optim.split(state.params, config.groups)[0]), list(mesh.devices.flat)
            log = StepLog(writer, config, stage.model, learning, loader.names, devices, start=start, rates=step.rates)
            lineage = claimed.record(settings, start)
            save = partial(checkpoint.save, checkpointer, passed_over=passed_over, lineage=lineage)
            try:
                evaluates = evaluate is not None and is_evaluated(config, start, steps)
                state = run(
                    config, state, step_fn, loader, steps, log=log, trace=trace,
                    evaluate=evaluate, answer_samples=answer_samples,
                    missed=evaluates and not has_evaluation(workdir, start), best=best, bad_steps=bad_steps,
                    save=watchdog.doing("a save")(save), raise_failed=raise_failed, stop=stop, watchdog=watchdog,
                )  # fmt: skip
                writer.flush()
                bad_steps.flush()
                return state
            finally:
                with watchdog.doing("the end"), contextlib.ExitStack() as closing:  # each closes, if another fails too
                    for part in (writer, loader, trace):
                        closing.callback(part.close)

        try:
            while (state := attempt()) is None:
                pass
            if int(state.step) < steps:
                opening.tell(name, f"ended at step {int(state.step)} of {steps}: {best.describe()}")
            return state
        except FloatingPointError as error:
            latest = checkpointer.latest
            saved = "there is no checkpoint" if latest is None else f"the last checkpoint is of step {latest}"
            raise FloatingPointError(f"{error}; {saved}") from error
        finally:
            with watchdog.doing("the end"), contextlib.ExitStack() as closing:
                for part in (checkpointer, loader):
                    closing.callback(part.close)


def run(
    config: ml_collections.ConfigDict,
    state: TrainState,
    step_fn: Callable,
    loader: Loader,
    steps: int,
    *,
    log: StepLog,
    trace: profiling.Trace,
    evaluate: Evaluate | None,
    answer_samples: Callable[[TrainState], list[Result]] | None,
    missed: bool,
    best: BestScore,
    bad_steps: BadSteps,
    save: Callable[[TrainState, int], None],
    raise_failed: Callable[[], None],
    stop: StopRequest,
    watchdog: Watchdog,
) -> TrainState | None:
    """Runs the training loop: the steps, and logs, checkpoints, evaluations and sample answers at intervals.

    Args:
      missed: whether the evaluation of the state's own step is still to be done.
      raise_failed: raises what has failed beside the loop, such as a save in the background.

    Returns:
      The state behind the last step, or behind the evaluation at which `best` ends the run; None if the run has to go
      back to its last checkpoint.

    Raises:
      FloatingPointError, OSError, Interrupted: see `train`.
    """

    def evaluated(step: int) -> bool:
        """Evaluates, keeps the best state, and returns whether nobody asked to stop meanwhile."""
        with watchdog.doing("an evaluation"):
            scalars = evaluate(state, stop.reached)
        if scalars is not None:
            log.write_evaluation(step, scalars)
            if best.add(step, scalars) or best.ends:
                save(state, loader.position)
        loader.flow()
        return scalars is not None

    def interrupted(step: int) -> Interrupted:
        return Interrupted(f"stopped at step {step} of {steps}, which is saved; the same command goes on from there")

    if bad_steps.first_of_row is not None:  # the run was stopped behind the last of too many
        return None
    first, owed = int(state.step), False
    if missed and not evaluated(first):
        raise interrupted(first)
    for step in range(first + 1, steps + 1):
        if best.ends:
            break
        with trace.begin(step, state):
            batch = next(loader)
            state, outputs = step_fn(state, batch)
        watchdog.begin(step, batch.images.shape, outputs["loss"])
        trace.end(step, state)
        raise_failed()
        bad_steps.add(step, loader.position - 1, outputs)
        if step % config.log_every == 0 or step == steps:
            if config.bad_steps.mode != "on" and not math.isfinite(loss := float(outputs["loss"])):
                raise FloatingPointError(f"the loss at step {step} is {loss}: lower the rates in groups")
            log.write(StepRecord(step, outputs, loader.flow(), loader.substituted, watchdog.held()))
        stopping = stop.reached()
        last, owed = stopping or step == steps, owed or step % config.checkpoint_every == 0
        due = evaluate is not None and is_evaluated(config, step, steps)
        if bad_steps.too_many(now=last or owed or due) and not stopping:
            return None
        # Save before the evaluation, which may fail or take longer than a preempted machine has; but not among bad
        # steps, whose end may be to go back behind them.
        if last or (owed and not bad_steps.unsettled):
            save(state, loader.position)
            owed = False
        if due and not stopping:
            due = stopping = not evaluated(step)
            if stopping:
                save(state, loader.position)
        if answer_samples and (step % config.predictions_every == 0 or step == steps) and not stopping:
            with watchdog.doing("the sample questions"):
                log.write_predictions(step, answer_samples(state))
            loader.flow()
        if stopping and (step < steps or due or bad_steps.first_of_row is not None):
            raise interrupted(step)
    return state


def is_evaluated(config: ml_collections.ConfigDict, step: int, steps: int) -> bool:
    """Returns whether a run evaluates after this step."""
    return step > 0 and (step % config.eval_every == 0 or step == steps)


def has_evaluation(workdir: pathlib.Path, step: int) -> bool:
    """Returns whether the metrics of a run hold an evaluation of this step, the same in all processes."""
    rows = [row for row in read_metrics(workdir) if row["step"] == step]
    found = any(key.startswith(("validation/", "evaluate/")) for row in rows for key in row)
    return distributed.exchange("evaluation of the first step", found)[0]
