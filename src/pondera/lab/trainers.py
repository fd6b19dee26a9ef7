"""Hugging Face's Trainer and Lightning as the training loop of a task: what a task's ``train(run)`` may call.

Both keep their loop, callbacks and conventions. The lab keeps what makes recipes comparable: the steps, the peak rate, the
optimizer, the penalty, the seed, and which examples are trained and scored on.

    def train(run):
        return with_trainer(run, compute_metrics=accuracy, metric="accuracy")
"""

import dataclasses
import importlib
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Subset, TensorDataset

from pondera._losses import default_loss, given_scores
from pondera.errors import BadInput, MissingExtra, nearest, needs_extra
from pondera.lab._chained import Chained
from pondera.lab.data import Items, Part, Placed, Stream, collated, moved, once
from pondera.lab.loop import Run

__all__ = ["with_lightning", "with_trainer"]

Score = Callable[[Any], float]
_BUDGET = "the comparison's budget says how many steps are run"
_RECIPE = "the recipe brings the optimizer, as in optim=AdamW(weight_decay=0.01)"
_OWNED = {  # arguments of transformers.TrainingArguments that are the lab's, and why
    **dict.fromkeys(("max_steps", "num_train_epochs"), _BUDGET),
    "learning_rate": "the lab tunes the learning rate",
    **dict.fromkeys(("optim", "optim_args", "optim_target_modules", "adafactor", "weight_decay"), _RECIPE),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "adam_epsilon"), _RECIPE),
    **dict.fromkeys(("seed", "data_seed"), "every run has the seed that the comparison gives it"),
    "use_cpu": "the comparison says on which device it runs",
    "push_to_hub": "runs of a comparison leave nothing behind",
    "resume_from_checkpoint": "every run of a comparison begins at its start",
}
_SCHEDULE = ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio")
_OWNED_BY_FIT = {  # arguments of lightning's Trainer that are the lab's, and why
    **dict.fromkeys(("max_steps", "max_epochs", "max_time", "min_steps", "min_epochs"), _BUDGET),
    **dict.fromkeys(("accelerator", "devices", "num_nodes", "strategy"), "the comparison says on which device it runs"),
    "default_root_dir": "runs of a comparison leave nothing behind",
    "fast_dev_run": _BUDGET,
}
_MIXED = {"bf16": "bf16-mixed", "fp16": "16-mixed"}  # precisions as Lightning calls them


class _Together(Chained):
    """Several optimizers as one whose groups stay theirs when a state is loaded, as accelerate does at its beginning."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.param_groups = [g for o in self.optimizers for g in o.param_groups]


def _optimizer(run: Run) -> torch.optim.Optimizer:
    return run.optimizers[0] if len(run.optimizers) == 1 else _Together(run.optimizers)


def _schedule(run: Run, optimizer: torch.optim.Optimizer) -> LambdaLR:
    """The lab's share of the peak rate, or the peak rate throughout where the task's settings say so."""
    constant = run.settings.schedule == "constant"
    return LambdaLR(optimizer, lambda done: 1.0 if constant else run.share(done + 1))


def _marks(run: Run) -> set[int]:
    """Steps at which the test is scored for the learning curve; the last is scored anyway."""
    n = run.settings.evaluations
    return {max(1, round(run.steps * k / n)) for k in range(1, n)} - {run.steps} if run.test is not None else set()


def _refuse(given: Mapping[str, Any], owned: Mapping[str, str], ours: Mapping[str, Any], where: str) -> None:
    for name, value in given.items():
        if name in owned and not (name in ours and ours[name] == value):
            raise BadInput(f"leave {name} out of {where}, which say {name}={value!r}: {owned[name]}")


def _refuse_settings(run: Run, names: Sequence[str], who: str) -> None:
    for name in names:
        if getattr(run.settings, name):
            raise BadInput(f"the task's setting {name} is of the lab's own loop, and {who} does not know it")


# -- Hugging Face ------------------------------------------------------------------------------------------------------


def with_trainer(
    run: Run,
    *,
    args: Any = None,
    data_collator: Callable[[list[Any]], Any] | None = None,
    compute_metrics: Callable[[Any], dict[str, float]] | None = None,
    metric: str | None = None,
    greater_is_better: bool = True,
    trainer_class: type | None = None,
    train_dataset: Callable[[Any], Any] | None = None,
    eval_dataset: Callable[[Any], Any] | None = None,
    callbacks: Sequence[Any] = (),
    **more: Any,
) -> Score:
    """Train ``run.model`` by `transformers.Trainer`, and return what scores it; for a task's ``train(run)``.

    The Trainer runs ``run.steps`` steps of the recipe's optimizer at the peak rate ``run.rate``, the penalty added to its
    loss. The schedule is the lab's, unless ``args`` name one (``lr_scheduler_type``, ``warmup_steps``). Batch, precision and
    clipping are the task's settings where ``args`` say nothing; the gradient is clipped to a norm of 1, the Trainer's own
    default, where neither does. ``gradient_accumulation_steps`` means what it means to the Trainer. Files go to a temporary
    folder that is removed, whatever ``output_dir`` says.

    Args:
        run: what ``train`` was given.
        args: a dict of what `transformers.TrainingArguments` take, or such an object, of which only what differs from its
            defaults counts as said.
        data_collator: as the Trainer takes it; by default the ``collate_fn`` of the task's loader, else the Trainer's.
        compute_metrics: as the Trainer takes it.
        metric: which of its metrics is the score; without it the score is minus the loss on the part.
        greater_is_better: whether more of `metric` is better; where not, the score is minus it.
        trainer_class: your own subclass of the Trainer.
        train_dataset: a function that makes the Trainer's training data of those at hand: a data set, or a tuple of tensors.
        eval_dataset: the same for the data that are scored on.
        callbacks: of the Trainer.
        more: other arguments of the Trainer, such as ``processing_class`` and ``compute_loss_func``.
    Returns: a function of a part that scores the trained model on it; higher is better.
    Raises: BadInput: for arguments that would make recipes run under different terms, such as ``learning_rate``, ``max_steps``
        and ``optim``. MissingExtra: without transformers or accelerate.
    """
    with needs_extra("with_trainer", "adapters"):
        import accelerate  # noqa: F401
        import transformers
    _refuse_settings(run, ["ema"], "transformers.Trainer")
    if run.settings.accumulate > 1:  # models that take any keyword have their losses added, not averaged
        raise BadInput(
            "the task's setting accumulate is of the lab's own loop; say gradient_accumulation_steps in the Trainer's args"
        )
    for name in ("model", "model_init", "optimizers", "optimizer_cls_and_kwargs"):
        if name in more:
            raise BadInput(f"leave {name} out of with_trainer: the run brings its model and the recipe's optimizer")
    for name, builder in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
        if builder is not None and not callable(builder):
            raise BadInput(
                f"{name} must be a function of the run's part, got a {type(builder).__name__}: the lab says which examples are "
                "trained and scored on, and takes them from data()"
            )
    if compute_metrics is not None and metric is None:
        raise BadInput("say which entry of compute_metrics is the score, such as metric='accuracy'")
    if metric is not None and compute_metrics is None:
        raise BadInput(f"metric={metric!r} names an entry of what compute_metrics gives; give compute_metrics too")
    arguments, said = _arguments(transformers, run, args)

    early = transformers.EarlyStoppingCallback
    stops = any(c is early or isinstance(c, early) for c in callbacks)
    chooses = bool(stops or said.get("load_best_model_at_end"))
    if chooses and run.valid is None:
        raise BadInput(
            "load_best_model_at_end and early stopping choose by validation data, and a comparison at one rate has none; give "
            "two rates or more"
        )
    watched = run.valid if chooses or run.test is None else run.test

    fit, collate = _examples(run, run.fit)
    own = collate if data_collator is None else data_collator
    if own is collate is not None:
        said.setdefault("remove_unused_columns", False)  # the collate function chose the columns
    if isinstance(run.fit, Stream) and run.fit.batched and getattr(run.fit.source, "batch_size", None):
        said.setdefault("per_device_train_batch_size", run.fit.source.batch_size)  # type: ignore[attr-defined]
    if _is_tuple(run.fit):
        said.setdefault("label_names", ["labels"])
        taken = inspect.signature(run.model.forward).parameters
        if "labels" not in taken and not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
            more.setdefault("compute_loss_func", _plain_loss)

    def evaluated(part: Any) -> Any:
        data = _examples(run, part)[0]
        return data if eval_dataset is None else eval_dataset(data)

    def worth(metrics: Mapping[str, float]) -> float:
        name = f"eval_{metric or 'loss'}"
        if name not in metrics:
            there = ", ".join(k.removeprefix("eval_") for k in metrics)
            raise BadInput(f"the Trainer's evaluation gives no {metric or 'loss'} to score by; it gives {there}")
        return float(metrics[name]) if metric and greater_is_better else -float(metrics[name])

    class Reported(transformers.TrainerCallback):
        """Asks for evaluations where the task's settings want them, and tells the run what came out."""

        marks = _marks(run) if "eval_strategy" not in said else set()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step in self.marks:
                control.should_evaluate = True

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
            if trainer.is_in_train and not (chooses and run.test is not None):  # the curve is the test's
                run.report(state.global_step, worth(metrics))

    with TemporaryDirectory(prefix="pondera-") as folder, warnings.catch_warnings():
        # what one part of transformers tells another, not the user
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        own_schedule = any(name in said for name in _SCHEDULE)
        trainer = _subclass(run, trainer_class or transformers.Trainer, own_schedule)(
            model=run.model,
            args=_made(arguments, said, run, folder),
            data_collator=own,
            train_dataset=fit if train_dataset is None else train_dataset(fit),
            eval_dataset=evaluated(watched),
            compute_metrics=compute_metrics,
            callbacks=[*callbacks, Reported()],
            **more,
        )
        if said.get("disable_tqdm") is not False:  # what they print would mix with the table
            for shown in (transformers.PrinterCallback, transformers.ProgressCallback):
                trainer.remove_callback(shown)
        trainer.train()

    def score(part: Any) -> float:
        return worth(trainer.evaluate(evaluated(part)))

    return score


def _arguments(transformers: Any, run: Run, given: Any) -> tuple[Any, dict[str, Any]]:
    """The class of the arguments, and what the user said."""
    kind: Any = transformers.TrainingArguments
    if given is None or isinstance(given, Mapping):
        said = dict(given or {})
        known = {f.name for f in dataclasses.fields(kind)}
        for name in said:
            if name not in known:
                raise BadInput(f"transformers.TrainingArguments have no {name!r}{nearest(name, known)}")
    elif isinstance(given, kind):
        kind = type(given)
        usual = kind(output_dir=given.output_dir)
        derived = ("output_dir", "logging_dir", "run_name")  # of the folder, or of the clock
        said = {
            f.name: getattr(given, f.name)
            for f in dataclasses.fields(kind)
            if f.init and f.name not in derived and getattr(given, f.name) != getattr(usual, f.name)
        }
    else:
        raise BadInput(f"args must be a dict or transformers.TrainingArguments, got {type(given).__name__}")
    ours = {"max_steps": run.steps, "learning_rate": run.rate, "seed": run.seed, "use_cpu": run.device == "cpu"}
    _refuse(said, _OWNED, ours, "the TrainingArguments")
    return kind, said


def _made(kind: Any, said: dict[str, Any], run: Run, folder: str) -> Any:
    """The arguments: the lab's, then the user's, then the task's settings."""
    s = run.settings
    usual = {
        "per_device_train_batch_size": s.batch,
        "per_device_eval_batch_size": max(s.batch, 64),
        "report_to": [],
        "save_strategy": "no",
        "eval_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": run.device != "cpu",
    }
    if s.precision != "no" and not {"bf16", "fp16"} & set(said):
        usual[s.precision] = True
    if s.clip is not None:
        usual["max_grad_norm"] = s.clip
    if s.compile:
        usual["torch_compile"] = True
    device = torch.device(run.device)
    if device.index:
        raise BadInput(
            f"transformers.Trainer takes the first device, and the run is on {run.device}; let CUDA_VISIBLE_DEVICES name that one"
        )
    said = {k: v for k, v in said.items() if k != "output_dir"}
    if said.get("load_best_model_at_end"):
        del usual["save_strategy"]
    if "logging_steps" in said:
        del usual["logging_strategy"]
    fixed = {"output_dir": folder, "max_steps": run.steps, "learning_rate": run.rate, "seed": run.seed}
    made = kind(**usual | said | fixed | {"use_cpu": device.type == "cpu"})
    if made.n_gpu > 1:  # the Trainer would spread the batch over all of them
        made._n_gpu = 1
    return made


def _subclass(run: Run, base: type, own_schedule: bool) -> Any:
    """The user's Trainer, or transformers', with the recipe's optimizer and penalty."""

    class Compared(base):  # type: ignore[valid-type]
        def __init__(self, **given: Any):
            optimizer = _optimizer(run)
            super().__init__(optimizers=(optimizer, None if own_schedule else _schedule(run, optimizer)), **given)

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            found = super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
            loss, outputs = found if return_outputs else (found, None)
            if model.training:
                whole = run.loss(loss)
                parts = getattr(self, "current_gradient_accumulation_steps", 1)
                if parts > 1 and self._scaled(kwargs.get("num_items_in_batch")):
                    whole = loss + (whole - loss) / parts  # the losses of a batch's parts are added as they are
                loss = whole
            if isinstance(outputs, Tensor):  # the Trainer takes the first of what has no names for the loss
                outputs = {"logits": outputs}
            return (loss, outputs) if return_outputs else loss

        def _scaled(self, num_items: Any) -> bool:
            told = getattr(self, "loss_is_scaled_for_ga", None)
            if told is not None:
                return bool(told)
            return bool(self.model_accepts_loss_kwargs and num_items is not None) or self.compute_loss_func is not None

        def evaluate(self, *args: Any, **kwargs: Any) -> Any:
            state = torch.get_rng_state()  # a look at the test must not change the training that goes on
            try:
                return super().evaluate(*args, **kwargs)
            finally:
                torch.set_rng_state(state)

    Compared.__name__ = Compared.__qualname__ = base.__name__
    return Compared


def _is_tuple(part: Any) -> bool:
    return not isinstance(part, Part)


def _examples(run: Run, part: Any) -> tuple[Any, Any]:
    """A part as a data set of the Trainer's, and how its examples become a batch (None: as the Trainer usually does)."""
    if isinstance(part, Placed):  # the Trainer moves batches itself
        part = part.part
    if isinstance(part, Items):
        whole = part.dataset if part.indices is None else Subset(part.dataset, part.indices.tolist())
        return whole, None if part.collate is collated else part.collate
    if isinstance(part, Stream):
        return (part.source.dataset, part.source.collate_fn) if part.batched else (part.source, None)  # type: ignore[attr-defined]
    if isinstance(part, Part):
        raise BadInput(f"transformers.Trainer cannot go through a {type(part).__name__}")
    return TensorDataset(*(t.cpu() for t in part)), _Named(run.model, len(part))


class _Named:
    """Examples of a tuple of tensors as the batch of names the Trainer needs: the last are the labels, those before are the
    model's arguments in their order."""

    def __init__(self, model: torch.nn.Module, count: int):
        taken = [n for n in inspect.signature(model.forward).parameters if n not in ("self", "labels")]
        self.names = [*taken[: count - 1], "labels"]
        if len(self.names) != count:
            raise BadInput(
                f"the model takes {len(taken)} inputs and the data hold {count - 1} besides the labels; let data() give a data set of "
                "dicts"
            )

    def __call__(self, examples: list[tuple[Tensor, ...]]) -> dict[str, Tensor]:
        return {name: torch.stack(column) for name, column in zip(self.names, zip(*examples))}


def _plain_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Cross-entropy for integer labels and squared error for floating ones, as the lab's own loop takes them."""
    return default_loss(given_scores(outputs), labels)


# -- Lightning ---------------------------------------------------------------------------------------------------------


def with_lightning(
    run: Run,
    module: Callable[[torch.nn.Module], Any],
    *,
    monitor: str,
    mode: str = "max",
    trainer: Mapping[str, Any] | None = None,
    loader: Callable[[Any, bool], Any] | None = None,
    callbacks: Sequence[Any] = (),
) -> Score:
    """Train ``run.model`` by a LightningModule, and return what scores it; for a task's ``train(run)``.

    The module's ``configure_optimizers`` is replaced by the recipe's optimizer under the lab's schedule, and the recipe's
    penalty is added to what ``training_step`` returns. Training runs ``run.steps`` steps over ``run.batches()``, the batches
    that the lab's own loop takes. Nothing is logged, shown or left on disk. Clipping, accumulation and precision are the
    task's settings where `trainer` says nothing.

    Args:
        run: what ``train`` was given.
        module: a function that takes the model and returns the LightningModule; its class will do where it takes the model
            alone.
        monitor: the name under which ``validation_step`` logs the score.
        mode: "max" where more is better; for "min" the score is minus it.
        trainer: arguments of Lightning's Trainer.
        loader: a function of a part and of whether it is trained on, that makes its DataLoader; ``run.batch_size`` is the
            task's. For loading by several processes; without it the lab makes the batches.
        callbacks: of Lightning's Trainer.
    Returns: a function of a part that scores the trained model on it; higher is better.
    Raises: BadInput: for arguments that would make recipes run under different terms, such as ``max_epochs``, for a module
        that steps by hand, and where `monitor` is not logged. MissingExtra: without lightning.
    """
    if mode not in ("max", "min"):
        raise BadInput(f"mode is 'max' or 'min', got {mode!r}")
    try:
        importlib.import_module("lightning.pytorch")
    except ImportError as error:
        if not (error.name or "").startswith("lightning"):
            raise
        raise _no_lightning() from None
    _refuse_settings(run, ["ema", "compile"], "Lightning")
    given = dict(trainer or {})
    _refuse(given, _OWNED_BY_FIT, {"max_steps": run.steps}, "the Trainer's arguments")
    callbacks = [*callbacks, *(given.pop("callbacks", None) or ())]

    bare = module(run.model)
    base = next((c for c in type(bare).__mro__ if c.__name__ == "LightningModule"), None)
    if base is None:
        raise BadInput(f"module(run.model) must return a LightningModule, got {type(bare).__name__}")
    if not bare.automatic_optimization:
        raise BadInput(
            f"{type(bare).__name__} steps its optimizers by hand; write such a loop in train(run), with run.loss and run.optimizer"
        )
    home = importlib.import_module(base.__module__.rpartition(".core")[0])  # lightning.pytorch, or pytorch_lightning
    chooses = any(isinstance(c, (home.callbacks.EarlyStopping, home.callbacks.ModelCheckpoint)) for c in callbacks)
    if chooses and run.valid is None:
        raise BadInput(
            "early stopping and checkpoints choose by validation data, and a comparison at one rate has none; give two rates or "
            "more"
        )
    watched = run.valid if chooses else run.test
    lit = _compared(run, bare)

    def worth(metrics: Mapping[str, Any]) -> float:
        if monitor not in metrics:
            raise BadInput(
                f"validation_step of {type(bare).__name__} logs no {monitor!r}{nearest(monitor, metrics)}; it logs "
                f"{', '.join(metrics) or 'nothing'}"
            )
        return float(metrics[monitor]) if mode == "max" else -float(metrics[monitor])

    class Reported(home.Callback):  # type: ignore[name-defined]
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            within = trainer.state.fn == "fit" and 0 < trainer.global_step < run.steps
            if within and not (chooses and run.test is not None):  # the curve is the test's
                run.report(trainer.global_step, worth(trainer.callback_metrics))

    def loaded(part: Any, training: bool) -> Any:
        return _Feed(run, part, training) if loader is None else loader(part, training)

    s, device = run.settings, torch.device(run.device)
    usual: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": any(isinstance(c, home.callbacks.ModelCheckpoint) for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "inference_mode": False,
        "accumulate_grad_batches": s.accumulate,
    }
    if watched is not None:
        pieces = given.get("accumulate_grad_batches", s.accumulate)
        every = max(1, run.steps // s.evaluations) * pieces
        usual |= {"val_check_interval": every, "check_val_every_n_epoch": None}
    if s.clip is not None:
        usual["gradient_clip_val"] = s.clip
    if s.precision != "no":
        usual["precision"] = _MIXED[s.precision]
    place: dict[str, Any] = {"accelerator": "gpu" if device.type == "cuda" else device.type}
    place["devices"] = [device.index or 0] if device.type == "cuda" else 1
    with _quiet(), TemporaryDirectory(prefix="pondera-") as folder:
        fitted = home.Trainer(
            **usual | given | place | {"max_steps": run.steps, "max_epochs": -1, "default_root_dir": folder},
            callbacks=[*callbacks, Reported()],
        )
        fitted.fit(lit, loaded(run.fit, True), None if watched is None else loaded(watched, False))
    run.model.to(run.device)  # Lightning ends by moving it to the CPU

    def score(part: Any) -> float:
        with _quiet():
            found = fitted.validate(lit, loaded(part, False), verbose=False)
        run.model.to(run.device)
        return worth(found[0] if found else {})

    return score


def _no_lightning() -> MissingExtra:
    found = MissingExtra("with_lightning needs the extra: pip install 'pondera[lightning]' (no module named lightning)")
    found.extra, found.name = "lightning", "lightning"
    return found


def _compared(run: Run, bare: Any) -> Any:
    """The user's module with the recipe's optimizer and penalty."""

    class Compared(type(bare)):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            optimizer = _optimizer(run)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": _schedule(run, optimizer), "interval": "step"},
            }

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            found = super().training_step(*args, **kwargs)
            if isinstance(found, Mapping):
                return {**found, "loss": run.loss(found["loss"])}
            return found if found is None else run.loss(found)

    Compared.__name__, Compared.__qualname__ = type(bare).__name__, type(bare).__qualname__
    bare.__class__ = Compared
    return bare


class _Feed:
    """The lab's batches of a part: endless and shuffled to train on, each example once to score."""

    def __init__(self, run: Run, part: Any, training: bool):
        self.run, self.part, self.training = run, part, training

    def __iter__(self) -> Iterator[Any]:
        run = self.run
        if self.training:
            return run.batches(-(-run.batch_size // run.settings.accumulate))
        return (moved(b, run.device) for b in once(self.part, max(run.batch_size, 64)))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's tips and its warnings about loaders, which would come once a run."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "pytorch_lightning", "lightning.fabric")]
    levels = [one.level for one in loggers]
    try:
        for one in loggers:
            one.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(lightning|pytorch_lightning)\b")
            yield
    finally:
        for one, level in zip(loggers, levels):
            one.setLevel(level)
